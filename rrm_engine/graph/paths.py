"""Names of nodes: their path in a graph, and their key among all jobs of a run."""


class NodePath(str):
    """Where a node is: ``root``, ``root.a``, ``root.a.b``. The fallback of a graph is ``root!direct``."""

    __slots__ = ()

    @property
    def parent(self) -> "NodePath | None":
        parent = self.rpartition(".")[0]
        return NodePath(parent) if parent else None

    @property
    def id(self) -> str:
        """Its id in its parent."""
        return self.rpartition(".")[2]

    def child(self, child_id: str) -> "NodePath":
        return NodePath(f"{self}.{child_id}")


ROOT = NodePath("root")


class NodeKey(str):
    """Names a node of one of a run's jobs, and its sequence: the job's key, a colon, the node's path."""

    __slots__ = ()

    @staticmethod
    def of(job: str, node: str) -> "NodeKey":
        return NodeKey(f"{job}:{node}")

    @property
    def job(self) -> str:
        return self.rpartition(":")[0]  # a job's key may hold colons, a path holds none

    @property
    def node(self) -> NodePath:
        return NodePath(self.rpartition(":")[2])
