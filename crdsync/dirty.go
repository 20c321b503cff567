package crdsync

import (
	"maps"
	"sync"
	"time"
)

// work says what may have changed.
type work struct {
	objects    bool            // an Egress or ExternalIPPool: all that depends on them
	nodes      bool            // a Node
	records    bool            // crdsync's own records in etcd, members left out
	cluster    bool            // what agents and operators write into etcd, on which the status depends
	namespaces map[string]bool // those whose labels changed
	pods       map[string]bool // the nodes whose pods, or members in etcd, changed
	since      time.Time       // when the first of the events came
}

func (w *work) addPods(node string) {
	if w.pods == nil {
		w.pods = map[string]bool{}
	}
	w.pods[node] = true
}

// dirty collects work. It is safe for concurrent use.
type dirty struct {
	wake chan struct{} // capacity 1

	mu sync.Mutex // guards work
	work
}

func newDirty() *dirty { return &dirty{wake: make(chan struct{}, 1)} }

// add adds work, and wakes whoever waits for it.
func (d *dirty) add(w work) {
	d.mu.Lock()
	if d.since.IsZero() {
		d.since = time.Now()
	}
	if !w.since.IsZero() && w.since.Before(d.since) { // it is tried again
		d.since = w.since
	}
	d.objects = d.objects || w.objects
	d.nodes = d.nodes || w.nodes
	d.records = d.records || w.records
	d.cluster = d.cluster || w.cluster
	if d.pods == nil {
		d.namespaces, d.pods = map[string]bool{}, map[string]bool{}
	}
	maps.Copy(d.namespaces, w.namespaces)
	maps.Copy(d.pods, w.pods)
	d.mu.Unlock()
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// take returns what was collected, and begins anew.
func (d *dirty) take() work {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := d.work
	d.work = work{}
	return w
}
