"""A spaCy component that adds the entities of a NER app to a ``Doc``; needs the extra ``spacy``.

import modeling_mtpf.spacy
nlp = spacy.blank("en")
nlp.add_pipe("mtpf_ner", config={"app": "apps/entities"})
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from .errors import AdapterError, require_extra

require_extra("spacy", "spacy")

from spacy.language import Language  # noqa: E402
from spacy.tokens import Doc  # noqa: E402
from spacy.util import filter_spans  # noqa: E402

from .data.backbones import load_backbone  # noqa: E402


@Language.factory("mtpf_ner", assigns=["doc.ents"], default_config={"app": "", "backbone": "packaged"})
class MtpfEntities:
    """Sets ``doc.ents``, at the app's exact characters: tokens in which an entity begins or ends are split.

    Entities that are there already give way where they overlap.

    Args:
        nlp: The pipeline.
        name: Of the component in it.
        app: Folder or Hub id of a NER app.
        backbone: ``packaged``, a folder or a Hub id.
    """

    def __init__(self, nlp: Language, name: str, app: str, backbone: str):
        if not app:
            raise AdapterError(
                'mtpf_ner needs an app: nlp.add_pipe("mtpf_ner", config={"app": "apps/entities"})'
            )
        self.model = load_backbone(backbone).eval()
        self.app = self.model.load_adapter(app)
        if [head.kind for head in self.model.parts(self.app).values()] != ["token-classification"]:
            raise AdapterError(f"{app} is not a NER app; the component mtpf_ner takes one.")

    def __call__(self, doc: Doc) -> Doc:
        """Add the entities of one text."""
        return self._add(doc, self.model.predict([doc.text], adapters=[self.app])[self.app][0])

    def pipe(self, stream: Iterable[Doc], batch_size: int = 256) -> Iterator[Doc]:
        """Add the entities of many texts, in batches."""
        source = iter(stream)
        while docs := list(islice(source, batch_size)):
            results = self.model.predict([doc.text for doc in docs], adapters=[self.app])[self.app]
            yield from map(self._add, docs, results)

    def _add(self, doc: Doc, rows: list[dict[str, Any]]) -> Doc:
        borders = {row[border] for row in rows for border in ("start", "end")}
        with doc.retokenize() as retokenizer:
            for token in doc:
                end = token.idx + len(token)
                cuts = [token.idx, *sorted(at for at in borders if token.idx < at < end), end]
                if len(cuts) > 2:
                    parts = [doc.text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
                    retokenizer.split(token, parts, heads=[(token, 0)] * len(parts))
        spans = [doc.char_span(row["start"], row["end"], label=row["entity_group"]) for row in rows]
        doc.ents = filter_spans([*filter(None, spans)] + [e for e in doc.ents if not _overlaps(e, rows)])
        return doc


def _overlaps(span: Any, rows: list[dict[str, Any]]) -> bool:
    return any(span.start_char < row["end"] and row["start"] < span.end_char for row in rows)
