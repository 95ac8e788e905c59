"""XMP packets: what is no longer true of an upscaled picture is taken out.

Reference: XMP specification part 1; the namespaces of motion photographs, gain maps and panoramas
(developer.android.com, developers.google.com), of Exif in XMP (CIPA DC-010) and of MWG regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.dom import minidom
from xml.parsers.expat import ExpatError

_PHOTOS = "http://ns.google.com/photos/1.0/"
_UNTRUE: dict[str, tuple[str, ...]] = {
    # Files that lay behind the picture, and maps of its pixels
    _PHOTOS + "camera/": ("MotionPhoto", "MicroVideo"),
    _PHOTOS + "container/": ("",),
    _PHOTOS + "container/item/": ("",),
    _PHOTOS + "image/": ("",),
    _PHOTOS + "depthmap/": ("",),
    _PHOTOS + "audio/": ("",),
    "http://ns.google.com/photos/dd/1.0/device/": ("",),
    "http://ns.adobe.com/hdr-gain-map/1.0/": ("",),
    "http://ns.apple.com/HDRGainMap/1.0/": ("",),
    "http://ns.apple.com/pixeldatainfo/1.0/": ("",),
    "http://ns.adobe.com/xmp/note/": ("HasExtendedXMP",),
    # Sizes and places in pixels
    _PHOTOS + "panorama/": ("Cropped", "FullPano", "LargestValidInterior"),
    "http://ns.adobe.com/tiff/1.0/": ("ImageWidth", "ImageLength", "BitsPerSample",
                                      "XResolution", "YResolution", "ResolutionUnit"),
    "http://ns.adobe.com/exif/1.0/": ("PixelXDimension", "PixelYDimension", "SubjectArea",
                                      "SubjectLocation", "FocalPlane"),
    "http://www.metadataworkinggroup.com/schemas/regions/": ("AppliedToDimensions",),
    # The old picture, small
    "http://ns.adobe.com/xap/1.0/": ("Thumbnails",),
}  # fmt: skip
"""What the names of properties begin with, by namespace."""
_TIFF = "http://ns.adobe.com/tiff/1.0/"
_SYNTAX = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


def upright(packet: bytes) -> bytes:
    """A packet of a picture of another size that is stored upright; as it is where that is true.

    Raises:
        ValueError: it is no XML, or declares entities.
    """
    document = _parsed(packet)
    changed = False
    for node in list(_nodes(document)):
        namespace, name = node.namespaceURI or "", node.localName or ""
        if namespace == _TIFF and name == "Orientation":
            changed |= _turn_upright(node)
        elif any(name.startswith(untrue) for untrue in _UNTRUE.get(namespace, ())):
            _remove(node)
            changed = True
    rewritten = _packet(document)  # if unchanged, this tells whether it can be, later
    return rewritten if changed else packet


def shortened(packet: bytes, limit: int) -> tuple[bytes | None, list[str]]:
    """A packet of at most `limit` bytes, without its longest properties, and their names.

    None where nothing is left to take out.
    """
    document = _parsed(packet)
    properties = [
        node
        for node in _nodes(document)
        if isinstance(node, minidom.Element)
        and isinstance(node.parentNode, minidom.Element)
        and (node.parentNode.namespaceURI, node.parentNode.localName) == (_SYNTAX, "Description")
    ]
    properties.sort(key=lambda node: len(node.toxml()))
    left_out = []
    while len(packet) > limit:
        if not properties:
            return None, []
        left_out.append(properties[-1].nodeName)
        _remove(properties.pop())
        packet = _packet(document)
    return packet, left_out


def orientation(packet: bytes) -> int:
    """How the pixels lie, as in EXIF: 1 to 8; 1 where the packet does not say.

    Raises:
        ValueError: as in `upright`.
    """
    for node in _nodes(_parsed(packet)):
        if (node.namespaceURI, node.localName) == (_TIFF, "Orientation"):
            value = _value(node)
            return int(value) if value.isdecimal() and 1 <= int(value) <= 8 else 1
    return 1


def _parsed(packet: bytes) -> minidom.Document:
    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise ValueError("it declares a document type")
    try:
        return minidom.parseString(packet.rstrip(b"\0"))  # noqa: S318 - no entities, see above
    except (ExpatError, UnicodeError) as error:
        raise ValueError(f"it is no XML ({error})") from error


def _packet(document: minidom.Document) -> bytes:
    return b"\n".join(node.toxml("utf-8") for node in document.childNodes)


def _nodes(document: minidom.Document) -> Iterator[minidom.Element | minidom.Attr]:
    """Every element and attribute."""
    waiting: list = [document.documentElement]
    while waiting:
        element = waiting.pop()
        yield element
        yield from list(element.attributes.values())
        waiting += [child for child in element.childNodes if child.nodeType == child.ELEMENT_NODE]


def _value(node: minidom.Element | minidom.Attr) -> str:
    return "".join(child.data for child in _texts(node)).strip()


def _turn_upright(node: minidom.Element | minidom.Attr) -> bool:
    if _value(node) == "1":
        return False
    if isinstance(node, minidom.Attr):
        node.value = "1"
        return True
    for text in _texts(node):
        text.data = "1"
    return True


def _texts(node: minidom.Element | minidom.Attr) -> list[minidom.Text]:
    return [child for child in node.childNodes if isinstance(child, minidom.Text)]


def _remove(node: minidom.Element | minidom.Attr) -> None:
    if isinstance(node, minidom.Attr):
        if node.ownerElement:
            node.ownerElement.removeAttributeNode(node)
    elif node.parentNode:
        node.parentNode.removeChild(node)
