package agent

import (
	"reflect"
	"time"

	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// reading is what was read of links, addresses, routes, rules and neighbours. It is read whole at the start, after an
// event of the kernel, after the agent wrote any of it, and every few minutes; else a reconcile reads what no event
// tells, and takes the rest as it was. It belongs to the goroutine of loop. (Package nft knows for itself what it need
// not read again.)
type reading struct {
	watcher routing.Watcher // which is used by the goroutine that watches, too
	all     kept[routing.Links]
	links   kept[vlan.Observed]
	routes  kept[routing.Observed]

	linksDiff  compared[vlan.State, vlan.Changes]
	routesDiff compared[routing.State, routing.Changes]
}

// invalidate has everything read whole the next time.
func (r *reading) invalidate() { r.all.known, r.links.known, r.routes.known = false, false, false }

// due returns when something has to be read by time alone: soon where an event was right before, since the kernel may
// not have been done yet, else in some minutes. Zero: never.
func (r *reading) due() (next time.Time) {
	for _, at := range []time.Time{r.all.due(&r.watcher), r.links.due(&r.watcher), r.routes.due(&r.watcher)} {
		next = earlier(next, at)
	}
	return next
}

// kept is a part of what was read.
type kept[T any] struct {
	value T
	at    routing.Moment
	known bool
	reads int // how often it was read whole
}

// observe returns the part as the kernel has it: what is kept, where that holds and is unchanged in what no event
// tells, and else what read returns.
func (k *kept[T]) observe(w *routing.Watcher, read func() (T, error), unchanged func(T) (bool, error)) (T, error) {
	if k.known && w.Holds(k.at) {
		if same, err := unchanged(k.value); same && err == nil { // after an error, read says what is wrong
			return k.value, nil
		}
	}
	at := w.Now() // before the read: what changes meanwhile may be missed by it
	v, err := read()
	k.value, k.at, k.known = v, at, err == nil
	k.reads++
	return v, err
}

func (k *kept[T]) due(w *routing.Watcher) (next time.Time) {
	if k.known {
		next = w.Due(k.at)
	}
	return next
}

// compared is the difference between a part, as it was read the last time, and what it is to be. Diff is pure, and
// takes longer than it takes to find that neither has changed.
type compared[S, C any] struct {
	want    S
	reads   int // of the part
	changes C
}

func (c *compared[S, C]) diff(reads int, want S, diff func() C) C {
	if c.reads != reads || !reflect.DeepEqual(c.want, want) {
		*c = compared[S, C]{want, reads, diff()}
	}
	return c.changes
}

// diffLinks and diffRoutes return what makes what was observed last what it is to be.
func (k *kernel) diffLinks(want vlan.State) vlan.Changes {
	return k.read.linksDiff.diff(k.read.links.reads, want, func() vlan.Changes { return vlan.Diff(k.read.links.value, want) })
}

func (k *kernel) diffRoutes(want routing.State) routing.Changes {
	return k.read.routesDiff.diff(k.read.routes.reads, want, func() routing.Changes { return routing.Diff(k.read.routes.value, want) })
}

// observeAll returns all links of the node.
func (k *kernel) observeAll() (routing.Links, error) {
	return k.read.all.observe(&k.read.watcher, routing.ReadLinks, func(l routing.Links) (bool, error) { return l.Unchanged(), nil })
}

// observeLinks returns the links and addresses of ours, observeRoutes the overlay link, routes, rules and neighbours.
func (k *kernel) observeLinks() (vlan.Observed, error) {
	return k.read.links.observe(&k.read.watcher, k.links.Observe, k.links.Unchanged)
}

func (k *kernel) observeRoutes() (routing.Observed, error) {
	return k.read.routes.observe(&k.read.watcher, k.router.Observe, k.router.Unchanged)
}

// applyLinks makes changes of links and addresses, applyRoutes of the rest. Of what goes with a link there is no event,
// so both have all read again.
func (k *kernel) applyLinks(c vlan.Changes) error {
	if c.Empty() {
		return nil
	}
	k.read.invalidate()
	return k.links.Apply(c)
}

func (k *kernel) applyRoutes(c routing.Changes) error {
	if c.Empty() {
		return nil
	}
	k.read.invalidate()
	return k.router.Apply(c)
}
