package crdsync

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// blockRest is how long a freed block rests by default: longer than a host outside keeps a connection that has
	// ended (twice the maximum segment lifetime, RFC 9293; 60 s with Linux), and than the node goes by Members that it
	// has from before.
	blockRest = 2 * time.Minute
	// maxBlocks is how many blocks of one IP a node has at a time. A third one is there while two have to drain.
	maxBlocks = 3
)

// Blocks come and go with crdsync's option. Turned off, all of them are freed in the first pass, each in the
// transaction that takes it out of the Members, and are deleted when they have rested. A former version of crdsync
// knows nothing of blocks/: it leaves the records, and writes the Members without Blocks in its first pass; so nodes
// have none of their ports any more, nobody else gets them, and who leads next with blocks gives them back to the nodes
// that have pods still, and frees the others.

// shortage is why a node has too few ports of an IP.
type shortage struct {
	egress, pool string
	has, want    int
}

// divide gives the node of some Members blocks of the IPs of their egresses, and takes away what it is not to have any
// more. It sets Members.Blocks, and returns the changes of the records, by the egress with whose Members they belong
// into one transaction; those of "" have none. policy returns the record of an egress; exists is whether there is a
// Node object.
//
// An IP of a pool belongs to one egress, so what a node has of an IP it has for that one. Static IPs are the node's
// own: they have none.
func (b *blocks) divide(
	node string, groups map[string]egress.Members, policy func(string) egress.Policy, exists bool, now time.Time,
) (changes map[string]unit, err error) {
	changes = map[string]unit{}
	short := map[netip.Addr]shortage{}
	for _, p := range b.portions(node, groups, policy, exists) {
		if p.settled(b.asked[node].ports[p.ip]) {
			b.list(groups, p.egress, p.has[0].Block)
			continue
		}
		var is []egress.Block
		lacks := 0
		if p.egress != "" {
			is, lacks = b.revise(node, p, now)
		} else {
			for _, n := range p.has {
				n := n.Block
				n.Freed = now
				is = append(is, n)
			}
		}
		slices.SortFunc(is, store.CompareBlocks)
		largest := 0
		guards := map[string]bool{}
		for _, n := range is {
			id := blockID{n.IP, n.First}
			where := p.egress
			if where == "" {
				where = b.holder(node, id)
			} else if n.Freed.IsZero() {
				b.list(groups, where, n)
				if !n.Retired {
					largest = max(largest, n.Size)
				}
			}
			op, ok, e := b.difference(id, n)
			if err = errors.Join(err, e); ok {
				changes[where] = append(append(changes[where], op), b.former(id, n)...)
				guards[where] = true
			}
		}
		for where := range guards {
			changes[where] = append(changes[where], guard(p.ip))
		}
		if lacks > 0 {
			short[p.ip] = shortage{p.egress, p.pool, largest, lacks}
		}
	}
	if !maps.Equal(b.short[node], short) {
		b.shortChanged = true
		if b.short[node] = short; len(short) == 0 {
			delete(b.short, node)
		}
	}
	return changes, err
}

// list adds a block to Members.
func (b *blocks) list(groups map[string]egress.Members, name string, n egress.Block) {
	m := groups[name]
	m.Blocks = append(m.Blocks, n)
	groups[name] = m
}

// portion is what a node has of the ports of an IP, and for which egress it is to have some.
type portion struct {
	ip           netip.Addr
	egress, pool string   // empty: it is to have none
	has, rest    []*block // rest: of those that it had, those that rest
}

// portions returns what a node has and is to have, by IP.
func (b *blocks) portions(node string, groups map[string]egress.Members, policy func(string) egress.Policy, exists bool) []*portion {
	byIP := make(map[netip.Addr]*portion, len(groups))
	of := func(ip netip.Addr) *portion {
		p := byIP[ip]
		if p == nil {
			p = &portion{ip: ip}
			byIP[ip] = p
		}
		return p
	}
	if b.size > 0 && exists {
		for name, m := range groups {
			for _, a := range policy(name).Addresses {
				if a.Pool != "" && hasFamily(m, familyOf(a.IP)) {
					p := of(a.IP)
					p.egress, p.pool = name, a.Pool
				}
			}
		}
	}
	for id, n := range b.byNode[node] {
		if p := of(id.ip); n.Freed.IsZero() {
			p.has = append(p.has, n)
		} else {
			p.rest = append(p.rest, n)
		}
	}
	for _, p := range byIP { // in no order of the map's
		slices.SortFunc(p.rest, func(x, y *block) int { return store.CompareBlocks(x.Block, y.Block) })
	}
	return slices.SortedFunc(maps.Values(byIP), func(x, y *portion) int { return x.ip.Compare(y.ip) })
}

// settled reports whether there is nothing to be decided, as is the rule: the node has one block, and its agent asks
// for nothing.
func (p *portion) settled(use egress.PortUse) bool {
	return p.egress != "" && len(p.has) == 1 && !p.has[0].Retired && !p.has[0].mend && use.Want == 0
}

func hasFamily(m egress.Members, f family) bool {
	return m.Egress != egress.Unselected && slices.ContainsFunc(m.Pods, func(p egress.Member) bool {
		return slices.ContainsFunc(p.IPs, func(ip netip.Addr) bool { return familyOf(ip) == f })
	})
}

// difference returns what makes the record of a block that; ok is false when there is nothing to do.
func (b *blocks) difference(id blockID, is egress.Block) (op store.Op, ok bool, err error) {
	op = store.Op{Key: id.key(), Absent: true}
	if was := b.byIP[id.ip][id.first]; was != nil {
		if !was.mend && was.Node == is.Node && was.Retired == is.Retired && was.Freed.Equal(is.Freed) {
			return op, false, nil
		}
		op.Absent, op.Revision = !was.there, was.revision
	}
	op.Value, err = store.Encode(is)
	return op, err == nil, err
}

// revise returns the blocks that a node is to have of an IP, and those that it has no more, given those that it has and
// those of it that rest. lacks is how many ports it should have in one block and cannot, 0: it has what it should.
//
// New connections get their ports from the one block that is not retired. A node that has none gets one of b.size, or
// of less where there is no such room. Where its agent wants more, it gets a larger one, as large as there is room for,
// and the former retires; where the agent wants less than half, a smaller one, but not of less than b.size. The agent
// says when no connection has a port of a retired block any more: then it is freed.
func (b *blocks) revise(node string, p *portion, now time.Time) (out []egress.Block, lacks int) {
	use := b.asked[node].ports[p.ip]
	var live []egress.Block
	for _, n := range p.has {
		// What the agent said before the record was last changed was about another life of these ports.
		if n.Retired && !n.mend && b.asked[node].revision > n.revision && slices.Contains(use.Drained, n.First) {
			gone := n.Block
			gone.Freed = now
			out = append(out, gone)
			continue
		}
		live = append(live, n.Block)
	}
	// the largest first
	slices.SortFunc(live, func(x, y egress.Block) int { return cmp.Or(cmp.Compare(y.Size, x.Size), cmp.Compare(x.First, y.First)) })
	current := slices.IndexFunc(live, func(n egress.Block) bool { return !n.Retired })
	if current < 0 && len(live) > 0 {
		current = 0
	}
	want := 0
	if use.Want > 0 {
		want = sizeFor(use.Want)
	}
	give := func(most, least int) bool {
		n, ok := b.give(node, p, most, least, now)
		if ok {
			live = append(live, n)
			current = len(live) - 1
		}
		return ok
	}
	// again makes one that is retired the one for new connections, the smallest that will do.
	again := func(least, most int) bool {
		for i := len(live) - 1; i >= 0; i-- {
			if live[i].Size >= least && live[i].Size <= most {
				current = i
				return true
			}
		}
		return false
	}
	switch {
	case current < 0:
		if most := max(b.size, want); !give(most, egress.MinBlock) {
			lacks = most
		}
	case want > live[current].Size:
		larger := 2 * live[current].Size
		switch {
		case again(want, egress.MaxBlock):
		case len(live) < maxBlocks && give(want, max(larger, 2*live[0].Size)):
		case live[0].Size >= larger: // not as large as it wants, but the largest that it can have
			current = 0
		}
		if live[current].Size < want && len(live) < maxBlocks {
			lacks = want
		}
	case want > 0 && 2*max(want, b.size) <= live[current].Size && want < live[current].Size/2: // so twice of what it wants is less than it has
		least := max(want, b.size)
		if !again(least, min(2*least, live[current].Size/2)) && len(live) < maxBlocks {
			give(least, least)
		}
	}
	for i := range live {
		live[i].Retired = i != current
	}
	return append(out, live...), lacks
}

// sizeFor returns the size of a block that has so many ports, or as many as one can have.
func sizeFor(ports int) int {
	ports = min(max(ports, egress.MinBlock), egress.MaxBlock)
	return 1 << bits.Len(uint(ports-1))
}

// give finds a block for a node, of most ports, or of fewer where there is no such room, but of least. One that was the
// node's and rests it gets back.
func (b *blocks) give(node string, p *portion, most, least int, now time.Time) (egress.Block, bool) {
	r := b.freePorts(p.ip)
	for size := most; size >= least; size /= 2 {
		n := egress.Block{IP: p.ip, Size: size, Node: node, Egress: p.egress, Since: now}
		for _, o := range p.rest {
			if id := (blockID{p.ip, o.First}); o.Size == size && !o.deleted && !b.reused[id] {
				b.reused[id] = true
				n.First = o.First
				return n, true
			}
		}
		var ok bool
		if n.First, ok = r.place(size); ok {
			b.planned[p.ip] = append(b.planned[p.ip], n)
			return n, true
		}
	}
	return egress.Block{}, false
}

// pressure says which egresses and pools have nodes with too few ports.
type pressure struct {
	egresses, pools map[string]string
}

func (p pressure) equal(o pressure) bool {
	return maps.Equal(p.egresses, o.egresses) && maps.Equal(p.pools, o.pools)
}

// pressure says who has too few ports.
func (b *blocks) pressure() pressure {
	byEgress, byPool := map[string][]string{}, map[string]map[netip.Addr]bool{}
	for _, node := range slices.Sorted(maps.Keys(b.short)) {
		for _, ip := range slices.SortedFunc(maps.Keys(b.short[node]), netip.Addr.Compare) {
			s := b.short[node][ip]
			said := fmt.Sprintf("node %s has %d ports of %s and asks for a block of %d, for which there is no room", node, s.has, ip, s.want)
			if s.has == 0 {
				said = fmt.Sprintf("node %s has no ports of %s, since none are left: the gateway translates for it, and its connections end with the gateway", node, ip)
			}
			byEgress[s.egress] = append(byEgress[s.egress], said)
			if byPool[s.pool] == nil {
				byPool[s.pool] = map[netip.Addr]bool{}
			}
			byPool[s.pool][ip] = true
		}
	}
	p := pressure{map[string]string{}, map[string]string{}}
	for name, said := range byEgress {
		if more := len(said) - maxNamed; more > 0 {
			said = append(said[:maxNamed], fmt.Sprintf("and %d more", more))
		}
		p.egresses[name] = strings.Join(said, "; ")
	}
	for name, ips := range byPool {
		var said []string
		for _, ip := range slices.SortedFunc(maps.Keys(ips), netip.Addr.Compare) {
			said = append(said, ip.String())
		}
		if more := len(said) - maxNamed; more > 0 {
			said = append(said[:maxNamed], fmt.Sprintf("%d more", more))
		}
		p.pools[name] = "nodes have fewer ports than they should, or none: there is no room for another block at " + strings.Join(said, ", ")
	}
	return p
}
