package crdsync

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/egret-project/egret/store"
)

const (
	// resync is how often everything is compared without an event. It writes nothing where etcd is as it has to be.
	resync = time.Minute
	// resyncPause is between the nodes, and namespaces, of which the pods are compared then.
	resyncPause = 10 * time.Millisecond
)

// resync compares everything once every interval until ctx ends.
func (m *mirror) resync(ctx context.Context) error {
	tick := time.NewTicker(resync)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m.compareAll(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// compareAll compares everything with etcd. One pass of all objects takes a second or more with 5,000 egresses, and
// pods' events would wait for it: so objects are compared here, beside the passes, and there is such a pass only where
// one differs. Pods are compared by the passes, a node at a time.
func (m *mirror) compareAll(ctx context.Context) {
	if m.differs() {
		m.dirty.add(work{objects: true})
		return
	}
	m.dirty.add(work{cluster: true}) // the statuses
	for _, w := range m.parts() {
		m.dirty.add(w)
		select {
		case <-time.After(resyncPause):
		case <-ctx.Done():
			return
		}
	}
}

// differs reports whether a pass would change anything but members, ranges and blocks of ports. It uses only what is
// safe for concurrent use.
func (m *mirror) differs() bool {
	now := view{m.cache, m.cache.Revision()}
	o, _ := m.source.objects()
	c := newControl(o, readRecords(m.cache), time.Now().UTC().Truncate(time.Second), m.isListed)
	puts, deletes, err := controlDifference(now, c)
	return err != nil || len(puts) > 0 || len(deletes) > 0
}

// parts returns the work that comes to all members, ranges and blocks of ports. As differs, it uses only what is safe
// for concurrent use.
func (m *mirror) parts() (out []work) {
	nodes := slices.Concat(m.source.nodesWithPods(), m.source.nodes.GetIndexer().ListKeys(), listedRanges(m.cache))
	nodes = slices.AppendSeq(nodes, maps.Keys(listedMembers(m.cache)))
	for key, r := range m.cache.List(store.BlockPrefix) {
		if b, err := store.DecodeBlock(key, r); err == nil {
			nodes = append(nodes, b.Node)
		}
	}
	slices.Sort(nodes)
	for _, namespace := range m.source.namespaces.GetIndexer().ListKeys() {
		out = append(out, work{namespaces: map[string]bool{namespace: true}})
	}
	for _, node := range slices.Compact(nodes) {
		out = append(out, work{pods: map[string]bool{node: true}})
	}
	return out
}
