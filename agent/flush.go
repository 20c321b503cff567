package agent

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// flush says which conntrack entries are to be deleted, so that their connections start afresh.
type flush struct {
	all bool // those of all pods that lack their mark: it is not known what happened before
	// those with a mark that is not their pod's: it is not known which pods there were before
	strays bool
	// those of all pods that are translated to something else than is wanted: it is not known to what
	repaired bool
	// of these pods, which got another egress or lost theirs, those that are not marked as they should be
	pods map[netip.Addr]bool
	// of these ids, those of own pods that are translated to something else than is wanted, since the gateway is
	// another
	stranded map[egress.ID]bool
	// those that are translated to these egress IPs, which left, or return; and those that others opened to them
	unhosted map[netip.Addr]bool
}

func newFlush() flush {
	return flush{pods: map[netip.Addr]bool{}, stranded: map[egress.ID]bool{}, unhosted: map[netip.Addr]bool{}}
}

func (f flush) empty() bool {
	return f.waits() && len(f.pods) == 0
}

// waits reports whether a flush is about nothing but pods that changed.
func (f flush) waits() bool {
	return !f.all && !f.strays && !f.repaired && len(f.stranded)+len(f.unhosted) == 0
}

func (f *flush) add(g flush) {
	f.all, f.strays, f.repaired = f.all || g.all, f.strays || g.strays, f.repaired || g.repaired
	maps.Copy(f.pods, g.pods)
	maps.Copy(f.stranded, g.stranded)
	maps.Copy(f.unhosted, g.unhosted)
}

// filters choose the entries that matches has to be asked about; none means all.
func (f flush) filters() []conntrack.Filter {
	if f.all {
		return nil
	}
	tagged := conntrack.Filter{Mark: egress.ConnTag, Mask: egress.ConnTagMask}
	var out []conntrack.Filter
	if f.strays || f.repaired {
		out = append(out, tagged)
	}
	for ip := range f.pods {
		out = append(out, conntrack.Filter{Source: ip})
	}
	for id := range f.stranded {
		out = append(out, conntrack.Filter{Mark: id.ConnMark(), Mask: ^egress.Mark(0)})
	}
	for ip := range f.unhosted {
		out = append(out, conntrack.Filter{Translated: ip, Mark: tagged.Mark, Mask: tagged.Mask}, conntrack.Filter{Destination: ip})
	}
	return out
}

// matches reports whether the entry is to be deleted, where the pods are as known says.
func (f flush) matches(c conntrack.Connection, known *pods) bool {
	tagged, id := c.Mark&egress.ConnTagMask == egress.ConnTag, egress.ID(c.Mark&egress.Mark(egress.MaxID))
	own, selected := known.local[c.Source]
	switch {
	case tagged && selected && own == id && slices.ContainsFunc(known.blocks[id], func(b egress.Block) bool { return b.Has(c.Translated, c.Port) }):
		return false // by a port of the node's own, whoever is the gateway
	case tagged && f.unhosted[c.Translated] || f.unhosted[c.Destination]:
		return true
	case !tagged:
		return selected && (f.all || f.pods[c.Source]) &&
			!slices.ContainsFunc(known.except, func(p netip.Prefix) bool { return p.Contains(c.Destination) })
	case selected && own == id:
		want := known.sources[id]
		ofOthers := known.hosted[want] && c.Port >= egress.FirstBlockPort
		return (f.repaired || f.strays || f.stranded[id]) && want.IsValid() && (c.Translated != want || ofOthers)
	case egress.OverlaySources4.Contains(c.Source) || egress.OverlaySources6.Contains(c.Source): // of another node's pod
		_, hosted := known.hosted[c.Translated]
		return (f.repaired || f.strays) && known.hosted != nil && !hosted
	default:
		return f.pods[c.Source] || f.strays
	}
}

// pods are those whose connections have a mark on this node.
type pods struct {
	local   map[netip.Addr]egress.ID     // the node's own
	blocks  map[egress.ID][]egress.Block // the node's, those included that retire
	sources map[egress.ID]netip.Addr     // what connections are translated to that are by no block
	// the egress IPs that are translated to here, and whether nodes have blocks of their ports; nil: it is not known
	// yet
	hosted map[netip.Addr]bool
	except []netip.Prefix
	whole  bool // none is missing from local
}

// A flush looks at the kernel's whole table of connections, whatever is in it. Pods that come and go all the time are
// to cost a flushShare-th of a core at most: each flush is charged with flushShare times what it took, and the next
// ones wait, for flushRest each and at most, once that is more than what time has paid off by flushBurst. So the
// flushes of one change, or of a few, wait for nothing, and what waits shares a flush. What is due since a gateway or
// the tables changed, and not since pods did, never waits: until then the tables drop what it is about.
const (
	flushShare = 20
	flushBurst = 2 * time.Second
	flushRest  = time.Second
)

// flusher deletes conntrack entries. It has a goroutine of its own (run): the table of connections is the node's, not
// ours, and takes seconds to be read where it is large. Nobody waits for it. That is safe: entries that are to go let
// no packet out with a wrong source, since the tables, which are written first, compare every packet's pod with its
// connection, and every source with the permits. Until the entries are gone such packets are dropped; then their
// connections start afresh, TCP in mid-stream and with the same ports.
//
// Why they go: those that a local pod opened before it had its egress IP, since none of its packets is to leave with
// another source from then on (connections within the cluster are left alone); those of a pod that has no egress IP any
// more, or another one, which the next pod of the address would inherit; those that are by no block of ports, and whose
// gateway was this node and is another one now, or the other way round: they are translated once; and those by egress
// IPs that this node steered and does no more: should such an IP come back, TCP has gone on without this node, and is
// out of any window that it knows.
type flusher struct {
	delete func(match func(conntrack.Connection) bool, filters ...conntrack.Filter) error
	wake   func()
	kick   chan struct{} // capacity 1: something is due
	urgent chan struct{} // capacity 1: something that does not wait is

	mu      sync.Mutex // guards what follows
	toFlush flush      // asked for, and not begun
	known   *pods
	err     error // of the last try
}

func newFlusher(wake func()) *flusher {
	f := &flusher{delete: conntrack.Delete, wake: wake, kick: make(chan struct{}, 1), urgent: make(chan struct{}, 1), toFlush: newFlush(), known: &pods{}}
	f.toFlush.all, f.toFlush.strays = true, true // what the former agent left undone is not known
	return f
}

// follow takes over what has changed in the kernel's tables, and what they are made of now. It never blocks, and
// returns the error of the last try, if there was one; then the next one begins.
func (f *flusher) follow(c nft.Changes, d plan.Desired) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(c.Repairs) > 0 {
		f.toFlush.all, f.toFlush.strays, f.toFlush.repaired = true, true, true
	}
	for _, ip := range c.Reselected {
		f.toFlush.pods[ip] = true
	}
	for _, ip := range c.Unhosted {
		f.toFlush.unhosted[ip] = true
	}
	sources := map[egress.ID]netip.Addr{}
	for _, id := range d.NFT.Pods {
		source := f.known.sources[id] // as long as it has no gateway
		if overlay, ok := d.NFT.OverlaySources[id]; ok {
			source = overlay
		} else if local, ok := d.NFT.Hosted[id]; ok {
			source = local.IP
		}
		if sources[id] = source; source != f.known.sources[id] {
			f.toFlush.stranded[id] = true
		}
	}
	blocks := map[egress.ID][]egress.Block{}
	maps.Copy(blocks, d.Blocks)
	for id, before := range f.known.blocks {
		for _, b := range before {
			switch {
			case contained(b, d.Blocks[id]):
			case d.NFT.Keep: // the record that says so may be one that cannot be read
				blocks[id] = append(slices.Clone(blocks[id]), b)
			default:
				f.toFlush.stranded[id] = true
			}
		}
	}
	hosted := f.known.hosted
	if !d.NFT.Keep && !d.NFT.KeepSenders {
		hosted = map[netip.Addr]bool{}
		for _, h := range d.NFT.Hosted {
			hosted[h.IP] = h.Shared
			if was, known := f.known.hosted[h.IP]; known && h.Shared && !was {
				f.toFlush.unhosted[h.IP] = true // it may have ports that are other nodes' from now on
			}
		}
	}
	f.known = &pods{local: d.NFT.Pods, blocks: blocks, sources: sources, hosted: hosted, except: d.NFT.Except, whole: !d.NFT.Keep}
	if due := f.dueLocked(); !due.empty() {
		notify(f.kick)
		if !due.waits() {
			notify(f.urgent)
		}
	}
	return f.err
}

// contained reports whether a block is one of these, or a part of one.
func contained(b egress.Block, in []egress.Block) bool {
	return slices.ContainsFunc(in, func(o egress.Block) bool { return o.Has(b.IP, b.First) && o.Has(b.IP, b.Last()) })
}

// dueLocked is what can be done now. What is not known yet is no stray.
func (f *flusher) dueLocked() flush {
	due := f.toFlush
	due.strays = due.strays && f.known.whole && f.known.hosted != nil
	return due
}

// returns says that an egress IP returns to this node: what is left of its last time here goes.
func (f *flusher) returns(ip netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.toFlush.unhosted[ip] = true
}

// run flushes until ctx ends.
func (f *flusher) run(ctx context.Context) error {
	var charged time.Duration // as of ended
	var ended time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.kick:
		}
		select {
		case <-f.urgent: // it is in what follows
		default:
		}
		began := time.Now()
		charged = max(0, charged-began.Sub(ended))
		f.flush()
		ended = time.Now()
		charged += flushShare * ended.Sub(began)
		if wait := min(charged-flushBurst, flushRest); wait > 0 {
			select {
			case <-ctx.Done():
			case <-f.urgent:
			case <-time.After(wait):
			}
		}
	}
}

// flush does what is due. What fails stays so, and the next round tries again.
func (f *flusher) flush() {
	f.mu.Lock()
	due, strays := f.dueLocked(), f.toFlush.strays
	f.toFlush = newFlush()
	f.toFlush.strays = strays && !due.strays
	f.mu.Unlock()
	err := f.delete(func(c conntrack.Connection) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return due.matches(c, f.known) // as they are now: the pods may have changed meanwhile
	}, due.filters()...)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.toFlush.add(due)
	}
	changed := (err == nil) != (f.err == nil)
	if f.err = err; changed {
		f.wake()
	}
}
