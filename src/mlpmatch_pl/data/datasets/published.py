"""Published lists of labeled images: their names, and the hashes that tell an original from a changed copy.

The lists are UniMatch's (MIT license). They are fetched by ``python -m mlpmatch_pl.prepare dataset=voc
splits=unimatch root=...`` into ``splits/`` below the data set's root, and are not part of this package.

Three different choices of VOC images are called "1/16" in papers. ``92`` to ``1464`` choose among VOC's own train set;
``blended`` ones choose among VOC's and SBD's together; ``u2pl`` ones too, but VOC's own masks first.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class PublishedList:
    """A list of labeled images with the list of the other training images, as published.

    Attributes:
        name: What it is called in ``dataset.labeled`` and in results, as in ``92`` or ``blended/1-16``.
        folder: Its folder below ``splits/``, which holds ``labeled.txt`` and ``unlabeled.txt``.
        labeled_sha256: Hash of the bytes of ``labeled.txt``.
        unlabeled_sha256: Hash of the bytes of ``unlabeled.txt``.
    """

    name: str
    folder: str
    labeled_sha256: str
    unlabeled_sha256: str


def _by_name(*lists: PublishedList) -> Mapping[str, PublishedList]:
    return MappingProxyType({entry.name: entry for entry in lists})


PUBLISHED: Mapping[str, Mapping[str, PublishedList]] = MappingProxyType(
    {
        "voc": _by_name(
            PublishedList(
                "92",
                "92",
                "8a02aa6a1253178b105bd25b36f0a27daeedf6b3959f399aa47d24783f3a8306",
                "a3eb5ef8d2ae547f131bfa60b8111d21700d458b545741336633d5aa209254d5",
            ),
            PublishedList(
                "183",
                "183",
                "de3f4680391cb15324402dae17ac0919933d0d9004c11a641c924f3f67147f9f",
                "39aa3fd2997799c57c7d68d1ab342e2ebf53224ab10c1766a9fcd1554afbfd6a",
            ),
            PublishedList(
                "366",
                "366",
                "74f6bd1e459a8b46fc204529d70b603769f8a45aef4553df8a5c04b5698e77b7",
                "591c593546d1dbb65bd4d08ae99fabc1e9958d614c8079c8961422b8b7df7433",
            ),
            PublishedList(
                "732",
                "732",
                "02c8ec5b62e27364f5bc91eb95bccf54debaa721e9d31c50c07507aea258fd0f",
                "8ddf828ec616b551447dc402c2c53eb7d0044697a0b6bacd6190ee843ffbf340",
            ),
            PublishedList(
                "1464",
                "1464",
                "b20486876df309c57c8230e957b2957fff5392ff5cb11f225e8453ed6c50ba3e",
                "3ba331d08fee0751486a8be3f9f269f9efc09faa82a32a703bbb7deda4d66544",
            ),
            PublishedList(
                "blended/1-16",
                "1_16",
                "0f5e114e6504c8afec6523db91f05503f120d1365cf505e6f4ef99f316d5873b",
                "29b30bf7adb5d39e642c57e3a3f4f26f9d4fb8f145098c430a597ef99160e36f",
            ),
            PublishedList(
                "blended/1-8",
                "1_8",
                "c5ea9bb095158a137e4c1db739b07d54a89af697de24ffd9e576493a4189653f",
                "5246f6e0bec70363a5b898e0d685d37b0afcfab4a71c010e7026555294d9eca9",
            ),
            PublishedList(
                "blended/1-4",
                "1_4",
                "a4573ca0fa8f97c4013dba5f8b233e77a1a8dc7877539b1eb18c8206d37227d0",
                "832ccd3a7971b1ed79e77f606a6736fa58d85f88aaf2eb88c856b27af74c847b",
            ),
            PublishedList(
                "u2pl/1-16",
                "u2pl_1_16",
                "a58cf5eda18c8e060c8fef0233b388b488e62e5903076fed90b5bd34cf6735d3",
                "4f038ee0eef3dc96863906821f2eb78c430941d9151ad78366fdbcc0b9e3aa8f",
            ),
            PublishedList(
                "u2pl/1-8",
                "u2pl_1_8",
                "cebe5f2fda695dd72ff3336d6bfef95967c903fe4d404d9827a42c5fbc1dfd8a",
                "fc4708a91ce72d15c1bf3515334abcc09d604f83f5110c12a5548af126e6f768",
            ),
            PublishedList(
                "u2pl/1-4",
                "u2pl_1_4",
                "b740bcf1ac91477ff0df913594ea70a00ced359a007a4050cac487f136470fa4",
                "43652ae8048ee32a75df1e27dd56147ad606d65a3721ac056294d6c7fb08ee06",
            ),
        ),
        "cityscapes": _by_name(
            PublishedList(
                "1-30",
                "1_30",
                "b11041fef70476fb5564af0ef006a8013622da9cf49c7faf4182f3e26eb32742",
                "1b8a9b7bb4f9f6f06a3dffe766efe8b10a14a0137637af1738bbb417a5c85dbe",
            ),
            PublishedList(
                "1-16",
                "1_16",
                "64195914dce1231133c7dc611fece213bc3a87fe4e0b73fbd96add7dfa8a2f46",
                "7f18e2aefb5e88598910e291a935117daaeef51c6828edeb62f8a6c882be0a79",
            ),
            PublishedList(
                "1-8",
                "1_8",
                "97291dfc509a8c90ee94e1c5fd1f7668c21205b995f53b963ac133f0ed96ee8e",
                "5d7d33e39a8bda908e12d7f33ecb3299f93a8596fbe3c5e0cc1f2d3f5d358459",
            ),
            PublishedList(
                "1-4",
                "1_4",
                "8edd24ae817eed7b49d0a06c95b7bfaf769002c98387e4edeab5e221ab7791c3",
                "6fc53258ed2e40f72f4a22b6e20d60a789168fdf6b860033f826e8bee3900e9b",
            ),
            PublishedList(
                "1-2",
                "1_2",
                "90d8e29d4d182c3b3def3d1fac02e454868c4ca632f73696bb521aa05e937ee4",
                "23d0efaa43a65608b25eb078ed058c53979957e44407d787e3abdda9a795d289",
            ),
        ),
    }
)
"""The published lists of a data set, by the data set's key and the list's name."""

VAL_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "voc": "df002e3a730c57678f63aa3e46a4c827a4066f1dc1814e24d0e8b215075e0c6c",
        "cityscapes": "cf5aa35c0e4446bc684b61b6be88e22299ef7b1851852b53fc6a34794f161544",
    }
)
"""Hash of ``val.txt``, which all lists of a data set share."""


def published_list(dataset: str, choice: object) -> PublishedList | None:
    """Find the published list that a choice names.

    Args:
        dataset: Key of the data set, as in ``voc``.
        choice: What ``dataset.labeled`` holds: a name, or a number where the name is one.

    Returns:
        The list, or None where the choice is no published name: a fraction, another count, or a file.

    Example:
        >>> published_list("voc", 92).folder, published_list("voc", "blended/1-16").folder
        ('92', '1_16')
        >>> published_list("voc", "1/16") is None, published_list("camvid", 92) is None
        (True, True)
    """
    if isinstance(choice, bool) or not isinstance(choice, str | int):
        return None
    return PUBLISHED.get(dataset, {}).get(str(choice))


def is_original(path: Path, sha256: str) -> bool:
    """Tell whether a file has exactly the published bytes; a missing file has not.

    Example:
        >>> is_original(Path("no such file"), VAL_SHA256["voc"])
        False
    """
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
