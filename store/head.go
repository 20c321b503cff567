package store

import (
	"errors"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// errRestored says that an answer was of another etcd than before.
var errRestored = errors.New("etcd is another one than before: it was restored, or replaced")

// bump is by how much a revision does not grow between two answers, but where a restore raised it: etcdutl snapshot restore --bump-revision.
const bump = 1 << 29

// head is how far etcd has come, as its answers to linearizable questions say.
type head struct {
	cluster, term uint64
	revision      int64
}

// precedes reports whether etcd may have come from a to b. Whoever restores a snapshot begins a new cluster, mostly of the same id, but at an older
// revision, a much newer one, or an older term of raft. Neither goes back by a change of member or leader, not even to a follower that is behind: it
// answers with what the leader had committed, which includes an entry of the leader's term.
func (a head) precedes(b head) bool {
	return a.cluster == 0 || a.cluster == b.cluster && a.term <= b.term && a.revision <= b.revision && b.revision-a.revision < bump
}

// heads notes what etcd answers, and so finds out that it was restored. It is safe for concurrent use.
type heads struct {
	mu       sync.Mutex // guards what follows
	newest   head
	restores int
	changed  chan struct{} // closed with the next restore
}

// question is what was known when etcd was asked.
type question struct {
	head
	restores int
	changed  <-chan struct{}
}

// ask returns what is known before a linearizable question.
func (h *heads) ask() question {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.changed == nil {
		h.changed = make(chan struct{})
	}
	return question{h.newest, h.restores, h.changed}
}

// saw takes in the revision of an event: a question that is asked from now on is not answered by an older one.
func (h *heads) saw(revision int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.newest.revision = max(h.newest.revision, revision)
}

// answered takes in the answer. It is measured by what was known when etcd was asked, for two answers may overtake each other. errRestored: it is
// another etcd, and restores counts that.
func (h *heads) answered(q question, r *pb.ResponseHeader) (restores int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	is := head{r.ClusterId, r.RaftTerm, r.Revision}
	if q.precedes(is) {
		if h.newest.precedes(is) {
			h.newest = is
		}
		return q.restores, nil
	}
	if !h.newest.precedes(is) || h.restores == q.restores { // else another answer has shown it
		h.newest = is
		h.restores++
		close(h.changed)
		h.changed = make(chan struct{})
	}
	return h.restores, errRestored
}
