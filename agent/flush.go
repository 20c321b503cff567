package agent

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// flush says which conntrack entries are to be deleted, so that their connections start afresh.
type flush struct {
	all      bool                // those of all pods that lack their mark: it is not known what happened before
	strays   bool                // those with a mark that is not their pod's: it is not known which pods there were before
	repaired bool                // those of all pods that are SNATed: it is not known to what
	pods     map[netip.Addr]bool // of these pods, which got another egress or lost theirs, those that are not marked as they should be
	left     map[member]bool     // at the gateway, those of pods that are no members any more
	stranded map[egress.ID]bool  // of these ids, those of own pods that are not by a block: they leave by another way since, translated as before
	unhosted map[netip.Addr]bool // those that are SNATed to these egress IPs, which left, or return; and those that others opened to them
}

// member is a pod's IP with the id of an egress IP.
type member struct {
	pod netip.Addr
	id  egress.ID
}

func newFlush() flush {
	return flush{pods: map[netip.Addr]bool{}, left: map[member]bool{}, stranded: map[egress.ID]bool{}, unhosted: map[netip.Addr]bool{}}
}

func (f flush) empty() bool {
	return !f.all && !f.strays && !f.repaired && len(f.pods)+len(f.left)+len(f.stranded)+len(f.unhosted) == 0
}

func (f *flush) add(g flush) {
	f.all, f.strays, f.repaired = f.all || g.all, f.strays || g.strays, f.repaired || g.repaired
	maps.Copy(f.pods, g.pods)
	maps.Copy(f.left, g.left)
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
	for m := range f.left {
		out = append(out, conntrack.Filter{Source: m.pod, Mark: m.id.ConnMark(), Mask: ^egress.Mark(0)})
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
	if tagged && selected && own == id {
		if known.blocks[id] == c.Translated && c.Port != 0 {
			return false // by a port of the node's own, whoever is the gateway
		}
		if f.stranded[id] {
			return true
		}
	}
	if tagged && f.unhosted[c.Translated] || f.unhosted[c.Destination] {
		return true
	}
	if !tagged {
		return selected && (f.all || f.pods[c.Source]) &&
			!slices.ContainsFunc(known.except, func(p netip.Prefix) bool { return p.Contains(c.Destination) })
	}
	translated := c.Translated != c.Source // by this node as the gateway: as the pod's node it binds the source
	members, hosted := known.members[id]
	switch {
	case selected && own == id:
		return f.repaired && translated
	case members[c.Source]:
		return false
	case f.pods[c.Source] || f.left[member{c.Source, id}]:
		return true
	default:
		return f.strays && (!translated || hosted)
	}
}

// pods are those whose connections have a mark on this node.
type pods struct {
	local   map[netip.Addr]egress.ID          // the node's own
	blocks  map[egress.ID]netip.Addr          // the IPs of which it has ports of its own
	ways    map[egress.ID]way                 // how their connections leave the node
	members map[egress.ID]map[netip.Addr]bool // all of each id that the node is the gateway of
	except  []netip.Prefix
	whole   bool // none is missing from local and members
}

// way is how the connections of an id leave the pods' node, which is written into those that are not by a block.
type way int

const (
	noWay       way = iota
	throughLoop     // and by any gateway, translated there
	straight        // from here, translated here
	toGateway       // by another node, translated here but for those without ports
)

func wayOf(m egress.Mark, block bool) way {
	switch {
	case !block:
		return throughLoop
	case m == egress.ToGatewayMark:
		return toGateway
	default:
		return straight
	}
}

// flusher deletes conntrack entries. It has a goroutine of its own (run): the table of connections is the node's, not ours, and takes
// seconds to be read where it is large. Nobody waits for it but the target of a planned move. That is safe: entries that are to go let
// no packet out with a wrong source, since the tables, which are written first, compare every packet's pod with its connection, and every
// source with the permits. Until the entries are gone such packets are dropped; then their connections start afresh, TCP in
// mid-stream and with the same ports.
//
// Why they go: those that a local pod opened before it had its egress IP, since none of its packets is to leave with another source
// from then on (connections within the cluster are left alone); those of a pod that has no egress IP any more, or another one, on its
// node and at the gateway, which the next pod of the address would inherit; and those by egress IPs that this node steered and does
// no more: should such an IP come back, TCP has gone on without this node, and is out of any window that it knows. Answers that came
// here for the next owner's connections were passed on, and look like connections to the IP: they would keep its ports.
type flusher struct {
	delete func(match func(conntrack.Connection) bool, filters ...conntrack.Filter) error
	wake   func()
	kick   chan struct{} // capacity 1

	mu    sync.Mutex // guards what follows
	owed  flush      // to be done
	doing flush      // being done
	known *pods
	err   error // of the last try
}

func newFlusher(wake func()) *flusher {
	f := &flusher{delete: conntrack.Delete, wake: wake, kick: make(chan struct{}, 1), owed: newFlush(), known: &pods{}}
	f.owed.all, f.owed.strays = true, true // what the former agent left undone is not known
	return f
}

// follow takes over what has changed in the kernel's tables, and what they are made of now. It never blocks, and returns the error of the last
// try, if there was one; then the next one begins.
func (f *flusher) follow(c nft.Changes, d plan.Desired) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(c.Repairs) > 0 {
		f.owed.all, f.owed.strays, f.owed.repaired = true, true, true
	}
	for _, ip := range c.Reselected {
		f.owed.pods[ip] = true
	}
	for _, ip := range c.Unhosted {
		f.owed.unhosted[ip] = true
	}
	blocks := map[egress.ID]netip.Addr{}
	for id, b := range d.NFT.Blocks {
		blocks[id] = b.IP
	}
	ways := map[egress.ID]way{}
	for _, id := range d.NFT.Pods {
		was := f.known.ways[id]
		ways[id] = was // as long as it has no way
		if m, ok := d.NFT.NextHops[id]; ok {
			ways[id] = wayOf(m, blocks[id].IsValid())
		}
		if now := ways[id]; now != was && (now == straight || was == straight || was == toGateway && now == throughLoop) {
			f.owed.stranded[id] = true
		}
	}
	known := &pods{local: d.NFT.Pods, blocks: blocks, ways: ways, members: d.Members, except: d.NFT.Except, whole: !d.NFT.Keep && !d.Routing.KeepReturns}
	if known.whole {
		for id, before := range f.known.members {
			for pod := range before {
				if now, hosted := known.members[id]; hosted && !now[pod] {
					f.owed.left[member{pod, id}] = true
				}
			}
		}
	} else {
		known.members = f.known.members
	}
	f.known = known
	if !f.dueLocked().empty() {
		select {
		case f.kick <- struct{}{}:
		default:
		}
	}
	return f.err
}

// dueLocked is what can be done now. A pod that is not known yet is no stray.
func (f *flusher) dueLocked() flush {
	due := f.owed
	due.strays = due.strays && f.known.whole
	return due
}

// returns says that an egress IP returns to this node: what is left of its last time here has to go first.
func (f *flusher) returns(ip netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owed.unhosted[ip] = true
}

// owes reports whether there may be something left of the last time that the egress IP was here.
func (f *flusher) owes(ip netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.owed.unhosted[ip] || f.doing.unhosted[ip]
}

// run flushes until ctx ends.
func (f *flusher) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.kick:
			f.flush()
		}
	}
}

// flush does what is due. What fails stays so, and the next pass tries again.
func (f *flusher) flush() {
	f.mu.Lock()
	due, strays := f.dueLocked(), f.owed.strays
	f.owed, f.doing = newFlush(), due
	f.owed.strays = strays && !due.strays
	f.mu.Unlock()
	err := f.delete(func(c conntrack.Connection) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return due.matches(c, f.known) // as they are now: the pods may have changed meanwhile
	}, due.filters()...)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.doing = newFlush(); err != nil {
		f.owed.add(due)
	}
	changed := (err == nil) != (f.err == nil)
	if f.err = err; changed || len(due.unhosted) > 0 {
		f.wake()
	}
}
