"""Folders of picture files, as a user has them: ROOT/SPLIT/CLASS/NAME.png."""

from pathlib import Path

from numbered_images import image


def write_folder(root: Path, split: str, classes: dict[str, int], start: int = 0) -> list[Path]:
    """So many pictures of each class, which ``numbers`` tells apart from ``start`` on."""
    files = []
    for name, count in classes.items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            files.append(folder / f"{start + len(files)}.png")
            image(start + len(files) - 1).save(files[-1])
    return files


def truncate(file: Path) -> None:
    """Leave half of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
