package store

import (
	"errors"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// errRestored says that an answer was of another etcd than before.
var errRestored = errors.New("etcd is another one than before: it was restored, or replaced")

// errTerm says that an answer was of an older term of raft than the one before, a moment ago.
var errTerm = errors.New("a member of etcd answers with an older term than another: asked again")

// bump is by how much a revision does not grow between two answers, but where a restore raised it: etcdutl snapshot
// restore --bump-revision.
const bump = 1 << 29

// termsDiffer is how long etcd's members may answer with different terms of raft: one that got its state as a whole has
// the new term with the next write.
const termsDiffer = 3 * time.Second

// head is how far etcd has come, as its answers to linearizable questions say.
type head struct {
	cluster, term uint64
	revision      int64
}

// precedes reports whether etcd may have come from a to b. Whoever restores a snapshot begins a new cluster, mostly of
// the same id, but at an older revision, or a much newer one. A revision does not go back by a change of member or
// leader, nor by a member that is behind: it answers with what the leader had committed.
func (a head) precedes(b head) bool {
	return a.cluster == 0 || a.cluster == b.cluster && a.revision <= b.revision && b.revision-a.revision < bump
}

// heads keeps the newest cluster id, term and revision that etcd answered with, and detects by them that etcd was
// restored. It is safe for concurrent use.
type heads struct {
	mu       sync.Mutex // guards what follows
	newest   head
	at       time.Time // of the last answer of that term or a newer one
	restores int
	changed  chan struct{} // closed with the next restore
}

// question is the state of heads before a request.
type question struct {
	head
	restores int
	changed  <-chan struct{}
}

// ask returns the state before a linearizable request.
func (h *heads) ask() question {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.changed == nil {
		h.changed = make(chan struct{})
	}
	return question{h.newest, h.restores, h.changed}
}

// saw takes in the revision of a watch's event, if the watch began after the last restore: an answer to a request from
// now on has no older revision.
func (h *heads) saw(revision int64, restores int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if restores == h.restores {
		h.newest.revision = max(h.newest.revision, revision)
	}
}

// answered takes in the header of an answer. It compares it with the state before the request, q, since two answers may
// overtake each other. errRestored: it is another etcd than then, and restores counts that, unless another answer has
// shown it meanwhile; then it is not known which etcd answered. errTerm: it may be another etcd; ask again.
func (h *heads) answered(q question, r *pb.ResponseHeader) (restores int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	is, now := head{r.ClusterId, r.RaftTerm, r.Revision}, time.Now()
	switch {
	case h.restores != q.restores: // another answer has shown it
		return q.restores, errRestored
	case q.precedes(is) && q.term > is.term && now.Sub(h.at) < termsDiffer:
		return h.restores, errTerm
	case q.precedes(is) && q.term <= is.term:
		if h.newest.precedes(is) {
			h.newest.cluster, h.newest.revision = is.cluster, is.revision
		}
		if is.term >= h.newest.term {
			h.newest.term, h.at = is.term, now
		}
		return h.restores, nil
	}
	h.newest, h.at = is, now
	h.restores++
	if h.changed != nil {
		close(h.changed)
	}
	h.changed = make(chan struct{})
	return h.restores, errRestored
}
