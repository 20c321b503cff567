package crdsync

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// blocks is an index of the blocks of ports in etcd, by IP and by node. A decision about a node costs what that node
// has; only a new block looks at the others of its IP.
//
// No two blocks of an IP may overlap, and distinct keys do not ensure that: 02048 with 2,048 ports and 03072 with 1,024
// are two keys. So each transaction that puts a block also requires that no key of its IP was put after the revision
// that the decision was based on (store.Op.Still). That revision is the cache's as it was before the pass began to
// read, or that of the pass's own last transaction with that IP. It follows:
//   - A former leader's late write is refused, since the election key has changed. If the new leader's cache lacks an
//     earlier one, the leader's transaction is refused until the cache has it.
//   - A transaction without an answer may still be committed later. If the next one with this IP comes first, the late
//     one is refused; else the next one is.
//   - Ports whose block was deleted meanwhile still count as taken, which is safe.
//
// A record that was lost or cannot be read is written anew from the Members that list the block: its node uses the
// ports. Where no Members list it, only its key is known, and the largest block that may begin there counts as taken
// until a person deletes the key. A key that names no port is ignored.
//
// Its methods are for one goroutine.
type blocks struct {
	size int           // how many ports the first block of a node has; 0: no node has any
	rest time.Duration // how long a freed block rests

	metrics *metrics      // nil: nobody asks
	history *blockHistory // nil: no history of blocks is kept

	byIP         map[netip.Addr]map[uint16]*block
	byNode       map[string]map[blockID]*block
	resting      map[blockID]*block
	copies       map[blockID]map[holding]egress.Block // what Members list
	listed       map[holding][]blockID                // the same the other way round
	asked        map[string]demanded                  // what agents say, by node
	faults       map[string]error                     // records that cannot be read, by key
	touched      map[netip.Addr]bool                  // IPs of which a block changed since reported looked
	overlap      map[netip.Addr]map[string]error      // what reported found
	short        map[string]map[netip.Addr]shortage   // node -> IPs of which it has too few ports
	shortChanged bool                                 // short was changed
	looked       time.Time                            // when rested looked last

	// What follows is of one pass.
	revision int64                         // of the cache, before anything was read
	own      map[netip.Addr]int64          // of the pass's last transaction with an IP
	planned  map[netip.Addr][]egress.Block // given, and not in the index yet
	reused   map[blockID]bool              // of those that rest, those that their nodes get back
}

// blockID is what the key of a block says.
type blockID struct {
	ip    netip.Addr
	first uint16
}

func (id blockID) key() string { return store.BlockKey(id.ip, id.first) }

// block is one block as it is known.
type block struct {
	egress.Block // without a node: all that is known is which ports it may have
	there        bool
	revision     int64
	mend         bool      // the record is lost or cannot be read, and Members list the block
	seen         time.Time // of a freed one: when this leader saw it first
	deleted      bool      // etcd has deleted it, which the cache does not show yet
}

// holding names a pair of Members.
type holding struct{ node, egress string }

// demanded is what an agent says of its ports, and the revision of its record when it began to say so.
type demanded struct {
	ports    map[netip.Addr]egress.PortUse
	revision int64
}

// begin empties the index: a leadership begins. revision is the cache's.
func (b *blocks) begin(revision int64) {
	*b = blocks{
		size: b.size, rest: b.rest, metrics: b.metrics, history: b.history,
		byIP: map[netip.Addr]map[uint16]*block{}, byNode: map[string]map[blockID]*block{}, resting: map[blockID]*block{},
		copies: map[blockID]map[holding]egress.Block{}, listed: map[holding][]blockID{}, asked: map[string]demanded{}, faults: map[string]error{},
		touched: map[netip.Addr]bool{}, overlap: map[netip.Addr]map[string]error{}, short: map[string]map[netip.Addr]shortage{},
	}
	b.metrics.noPorts()
	b.renew(revision)
}

// renew begins a pass. revision is that of the cache before it is asked what changed.
func (b *blocks) renew(revision int64) {
	b.revision = revision
	b.own, b.planned, b.reused = map[netip.Addr]int64{}, map[netip.Addr][]egress.Block{}, map[blockID]bool{}
}

// getter is a store.Cache, as far as single records are concerned.
type getter interface {
	Get(key string) (store.Record, bool)
}

// read takes in all that the cache shows. members are the egresses that have Members on a node.
func (b *blocks) read(cache *store.Cache, members map[string]map[string]bool) {
	for key := range cache.List(store.BlockPrefix) {
		b.recordChanged(cache, key, &work{})
	}
	for node, names := range members {
		for name := range names {
			b.membersChanged(cache, node, name)
		}
	}
	for key := range cache.List(store.AgentPrefix) {
		b.agentChanged(cache, strings.TrimPrefix(key, store.AgentPrefix))
	}
}

// recordChanged takes in the record of a block, and adds to w whom that concerns.
func (b *blocks) recordChanged(cache getter, key string, w *work) {
	r, there := cache.Get(key)
	was := b.faults[key]
	delete(b.faults, key)
	now, err := store.DecodeBlock(key, r)
	if there && err != nil {
		b.faults[key] = err
	}
	w.records = w.records || (was == nil) != (b.faults[key] == nil) // faults are reported by a pass that plans
	id := blockID{now.IP, now.First}                                // of the key, unless that is none
	if !id.ip.IsValid() {
		return
	}
	old := b.byIP[id.ip][id.first]
	b.set(id, &block{Block: now, there: there, revision: r.Revision}, err)
	is := b.byIP[id.ip][id.first]
	for _, n := range []*block{old, is} {
		if n != nil && n.Node != "" {
			w.addPods(n.Node)
		}
	}
	if is != nil {
		return
	}
	for node, of := range b.short { // ports are free now
		if _, ok := of[id.ip]; ok {
			w.addPods(node)
		}
	}
}

// membersChanged takes in which blocks the Members of an egress on a node list.
func (b *blocks) membersChanged(cache getter, node, name string) {
	h := holding{node, name}
	touched := b.listed[h]
	for _, id := range touched {
		delete(b.copies[id], h)
		if len(b.copies[id]) == 0 {
			delete(b.copies, id)
		}
	}
	delete(b.listed, h)
	var last []byte
	for _, key := range memberKeys(node, name) {
		r, _ := cache.Get(key)
		if !bytes.Contains(r.Value, []byte(`"blocks":`)) || bytes.Equal(r.Value, last) {
			continue
		}
		last = r.Value
		m, err := store.Decode[struct{ Blocks []egress.Block }](r) // the pods would cost as much again
		if err != nil {
			continue // it is written anew by what is known otherwise
		}
		for _, c := range m.Blocks {
			id := blockID{c.IP, c.First}
			if c.Fault() != nil || !c.IP.IsValid() || c.Node != node || !c.Freed.IsZero() {
				continue
			}
			if b.copies[id] == nil {
				b.copies[id] = map[holding]egress.Block{}
			}
			b.copies[id][h] = c
			b.listed[h] = append(b.listed[h], id)
		}
	}
	for _, id := range slices.Concat(touched, b.listed[h]) {
		if n := b.byIP[id.ip][id.first]; n != nil && n.there && !n.mend && n.Node != "" {
			continue // there is a record, which is what counts
		}
		r, there := cache.Get(id.key())
		now, err := store.DecodeBlock(id.key(), r)
		b.set(id, &block{Block: now, there: there, revision: r.Revision}, err)
	}
}

// agentChanged takes in what the agent of a node says, and reports whether that is another thing of its ports.
func (b *blocks) agentChanged(cache getter, node string) bool {
	var a egress.Agent
	r, there := cache.Get(store.AgentKey(node))
	if there {
		var err error
		if a, err = store.Decode[egress.Agent](r); err != nil {
			return false // what it said stands
		}
	}
	if maps.EqualFunc(b.asked[node].ports, a.Ports, func(x, y egress.PortUse) bool { return x.Want == y.Want && slices.Equal(x.Drained, y.Drained) }) {
		return false
	}
	b.asked[node] = demanded{a.Ports, r.Revision}
	if len(a.Ports) == 0 {
		delete(b.asked, node)
	}
	return true
}

// set takes in a block: n is as its record has it, err why there is none or it cannot be read.
func (b *blocks) set(id blockID, n *block, err error) {
	b.touched[id.ip] = true
	old := b.byIP[id.ip][id.first]
	if old != nil {
		b.metrics.ports(id.ip, -old.Size)
		delete(b.byIP[id.ip], id.first)
		if len(b.byIP[id.ip]) == 0 {
			delete(b.byIP, id.ip)
		}
		delete(b.byNode[old.Node], id)
		if len(b.byNode[old.Node]) == 0 {
			delete(b.byNode, old.Node)
		}
		delete(b.resting, id)
	}
	if err != nil && !b.restore(id, n) {
		return
	}
	if b.byIP[id.ip] == nil {
		b.byIP[id.ip] = map[uint16]*block{}
	}
	b.byIP[id.ip][id.first] = n
	b.metrics.ports(id.ip, n.Size)
	if n.Node != "" {
		if b.byNode[n.Node] == nil {
			b.byNode[n.Node] = map[blockID]*block{}
		}
		b.byNode[n.Node][id] = n
	}
	if !n.Freed.IsZero() {
		n.seen = time.Now()
		if old != nil && old.Freed.Equal(n.Freed) {
			n.seen = old.seen
		}
		b.resting[id] = n
	}
	n.deleted = old != nil && old.deleted && old.revision == n.revision
}

// restore fills in a block whose record cannot be read, from the Members, else with the largest block that may begin
// there; false: there is none.
func (b *blocks) restore(id blockID, n *block) bool {
	if of := b.copies[id]; len(of) > 0 {
		first := slices.MinFunc(slices.Collect(maps.Keys(of)), func(x, y holding) int { return cmp.Or(cmp.Compare(x.node, y.node), cmp.Compare(x.egress, y.egress)) })
		n.Block, n.mend = of[first], true
		return true
	}
	n.Block = egress.Block{IP: id.ip}
	n.First, n.Size = extent(id.first)
	return n.there
}

// holder returns the egress whose Members on a node list a block; "": none.
func (b *blocks) holder(node string, id blockID) string {
	name := ""
	for h := range b.copies[id] {
		if h.node == node && (name == "" || h.egress < name) {
			name = h.egress
		}
	}
	return name
}

// freePorts returns the ports of an IP that no block has.
func (b *blocks) freePorts(ip netip.Addr) *freePorts {
	r := newFreePorts()
	for _, o := range b.byIP[ip] {
		r.take(o.First, o.Size)
	}
	for _, o := range b.planned[ip] {
		r.take(o.First, o.Size)
	}
	return r
}

// reported adds to faults what is wrong with the records, by key. Blocks that overlap are of somebody else's making:
// both stand.
func (b *blocks) reported(faults map[string]error) {
	for ip := range b.touched {
		delete(b.overlap, ip)
		var last *block
		for _, first := range slices.Sorted(maps.Keys(b.byIP[ip])) {
			n := b.byIP[ip][first]
			if n.Node == "" {
				continue
			}
			if last == nil || !last.Overlaps(n.Block) {
				last = n
				continue
			}
			if b.overlap[ip] == nil {
				b.overlap[ip] = map[string]error{}
			}
			b.overlap[ip][blockID{ip, first}.key()] = fmt.Errorf("it overlaps with the block from %d, of node %s", last.First, last.Node)
		}
	}
	clear(b.touched)
	maps.Copy(faults, b.faults)
	for _, of := range b.overlap {
		maps.Copy(faults, of)
	}
}

// rested returns the changes that delete the freed blocks that have rested. The time is taken by this process's clock,
// from when this leader saw the block freed; the time in the record is another clock's, for people to read.
func (b *blocks) rested(now time.Time) (out []unit) {
	b.looked = now
	for id, n := range b.resting {
		if !n.deleted && !b.reused[id] && !now.Before(n.seen.Add(b.rest)) {
			out = append(out, append(unit{{Key: id.key(), Revision: n.revision}}, b.history.record(n.Block)...))
		}
	}
	slices.SortFunc(out, func(x, y unit) int { return cmp.Compare(x[0].Key, y[0].Key) })
	return out
}

// next returns when the next block has rested; the zero Time: never. What etcd refused to delete is tried again as
// other refusals are.
func (b *blocks) next() (at time.Time) {
	for _, n := range b.resting {
		if due := n.seen.Add(b.rest); !n.deleted && due.After(b.looked) && (at.IsZero() || due.Before(at)) {
			at = due
		}
	}
	return at
}

// guard returns the condition that no block of an IP was put meanwhile, for a unit that puts one. guarded fills in the
// revision.
func guard(ip netip.Addr) store.Op {
	return store.Op{Key: store.BlockPrefix + ip.String() + "/", Still: 1}
}

// guarded returns the changes of a transaction with each guard once, and its revision.
func (b *blocks) guarded(ops unit) unit {
	out := make(unit, 0, len(ops))
	seen := map[string]bool{}
	for _, op := range ops {
		if op.Still != 0 {
			if seen[op.Key] {
				continue
			}
			seen[op.Key] = true
			op.Still = max(b.revision, b.own[guardedIP(op)], 1)
		}
		out = append(out, op)
	}
	return out
}

// logText returns what is to be logged of a change that was made, and the block; "": nothing. The log says who had
// which ports when, long after.
func (b *blocks) logText(op store.Op) (what string, n egress.Block) {
	if !strings.HasPrefix(op.Key, store.BlockPrefix) || op.Value == nil {
		return "", n
	}
	n, err := store.DecodeBlock(op.Key, store.Record{Value: op.Value})
	switch {
	case err != nil:
		return "", n
	case !n.Freed.IsZero():
		return "block of ports taken from a node, rests", n
	case op.Absent:
		return "block of ports given to a node", n
	case b.resting[blockID{n.IP, n.First}] != nil:
		return "block of ports given back to its node", n
	}
	return "", n // it retires
}

func guardedIP(op store.Op) netip.Addr {
	ip, _ := netip.ParseAddr(strings.Trim(strings.TrimPrefix(op.Key, store.BlockPrefix), "/")) // guard made it of one
	return ip
}

// committed takes in a transaction that etcd committed at a revision.
func (b *blocks) committed(ops unit, revision int64) {
	for _, op := range ops {
		switch {
		case op.Still != 0:
			b.own[guardedIP(op)] = revision
		case op.Value == nil && strings.HasPrefix(op.Key, store.BlockPrefix):
			of, _ := store.DecodeBlock(op.Key, store.Record{}) // it has the key's part of it
			if n := b.resting[blockID{of.IP, of.First}]; n != nil {
				n.deleted = true
			}
		case strings.HasPrefix(op.Key, store.BlockHistoryPrefix):
			b.history.written()
		}
	}
}
