"""Files for other engines: made from a plan, a profile or a checkpoint."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.exports.registry import EXPORTS, Export, ExportJob
    from moqa.exports.run import Exported, export
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["EXPORTS", "Export", "ExportJob", "Exported", "export"]
