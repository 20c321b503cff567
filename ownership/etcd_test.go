package ownership

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
)

// etcd is a simulated one: linearizable, with revisions and leases, by true time. A snapshot that was taken of it never
// changes.
type etcd struct {
	w          *world
	rev        int64
	term       int64
	owners     map[netip.Addr]egress.Owner
	agents     map[string]egress.Agent // Lease is what the record says
	longest    time.Duration           // P
	longestRev int64
	agentsRev  int64            // of the last change of agents
	recordRev  map[string]int64 // of the last change of one's record
	suspicions map[string]egress.Suspicion
	under      map[string]int64 // the lease that a record of agents is under
	moves      map[netip.Addr]egress.Move
	last       map[netip.Addr]record // of an IP's history
	leases     map[int64]*lease
	nextID     int64
	down       bool
	// deposed: renewals are granted by a leader that was cut off, and do nothing.
	deposed bool

	snapshot *egress.Snapshot
}

type lease struct {
	ttl     time.Duration
	expires time.Duration
}

type record struct {
	egress.Tenure
	rev int64
}

// changed makes a revision.
func (e *etcd) changed() int64 {
	e.rev++
	e.snapshot = nil
	e.w.writes++
	return e.rev
}

func (e *etcd) take() *egress.Snapshot {
	if e.snapshot == nil {
		s := *e.w.base
		s.Revision, s.Agents, s.Owners, s.Moves, s.Longest = e.rev, maps.Clone(e.agents), maps.Clone(e.owners), maps.Clone(e.moves), e.longest
		s.Suspicions = maps.Clone(e.suspicions)
		e.snapshot = &s
	}
	return e.snapshot
}

// backup returns a copy of what etcd holds.
func (e *etcd) backup() *etcd {
	b := *e
	b.owners, b.agents, b.under, b.moves = maps.Clone(e.owners), maps.Clone(e.agents), maps.Clone(e.under), maps.Clone(e.moves)
	b.last, b.leases = maps.Clone(e.last), map[int64]*lease{}
	b.recordRev, b.suspicions = maps.Clone(e.recordRev), maps.Clone(e.suspicions)
	for id, l := range e.leases {
		c := *l
		b.leases[id] = &c
	}
	return &b
}

// restore makes etcd what it was at the backup, with the whole life of each lease ahead, in a new term.
func (e *etcd) restore(b *etcd) {
	id := e.nextID
	*e = *b.backup()
	e.nextID, e.snapshot, e.deposed, e.down = id, nil, false, false
	e.w.term++
	e.term = e.w.term
	for _, id := range slices.Sorted(maps.Keys(e.leases)) {
		e.leases[id].expires = e.w.now + e.leases[id].ttl
		e.w.expire(id)
	}
	e.w.watchers()
}

func (e *etcd) grant(ttl time.Duration) int64 {
	e.nextID++
	e.leases[e.nextID] = &lease{ttl: ttl, expires: e.w.now + ttl}
	e.w.expire(e.nextID)
	return e.nextID
}

func (e *etcd) renew(id int64) bool {
	l := e.leases[id]
	if l == nil {
		return false
	}
	if !e.deposed {
		l.expires = e.w.now + l.ttl
	}
	return true
}

func (e *etcd) revoke(id int64) {
	if e.leases[id] == nil {
		return
	}
	delete(e.leases, id)
	gone := false
	for ip, o := range e.owners {
		if o.Lease == id {
			delete(e.owners, ip)
			gone = true
		}
	}
	for n, l := range e.under {
		if l == id {
			delete(e.under, n)
			delete(e.agents, n)
			delete(e.recordRev, n)
			gone = true
		}
	}
	for ip, m := range e.moves {
		if m.Lease == id {
			delete(e.moves, ip)
			gone = true
		}
	}
	if gone {
		e.changed()
		e.w.watchers()
	}
}

// putAgent is store.Client.PutAgent.
func (e *etcd) putAgent(id int64, a egress.Agent, seen int64) (ok, lost bool) {
	if e.leases[id] == nil {
		return false, true
	}
	if e.recordRev[a.Node] > seen {
		return false, false
	}
	e.agents[a.Node], e.under[a.Node] = a, id
	e.agentsRev = e.changed()
	e.recordRev[a.Node] = e.agentsRev
	e.w.watchers()
	return true, false
}

// setLongest is store.Client.RaisePermit and LowerPermit, of who saw etcd at revision seen.
func (e *etcd) setLongest(l Longest, seen int64) bool {
	if e.w.opt.noLongest || e.longestRev > seen || !l.Raise && e.agentsRev > seen {
		return false
	}
	e.longest, e.longestRev = l.Permit, e.changed()
	e.w.watchers()
	return true
}

func (e *etcd) putOwner(o egress.Owner, t egress.Tenure) {
	rev := e.changed()
	o.Revision = rev
	e.owners[o.IP] = o
	e.last[o.IP] = record{t, rev}
	e.w.watchers()
}

// released is the read of store.Client.Claim: who gave the IP up after the lock of revision seen, and the revision up
// to which that is known.
func (e *etcd) released(ip netip.Addr, seen int64) (from string, rev int64) {
	t, ok := e.last[ip]
	if !ok || t.Node != "" || t.Why != egress.ReasonRelease || t.rev <= seen {
		return "", 0
	}
	return t.From, t.rev
}

// claim is the transaction of store.Client.Claim; rev is what released said. again: it is to be tried without the
// suspicion.
func (e *etcd) claim(id int64, o egress.Owner, c Claim, rev int64) (ok, lost, again bool) {
	if e.leases[id] == nil {
		return false, true, false
	}
	if have, owned := e.owners[o.IP]; owned {
		return have.Lease == id, false, false
	}
	if o.From != "" && e.last[o.IP].rev > rev {
		return false, false, false
	}
	if o.Suspicion > 0 && (e.suspicions[c.Suspicion.Node].Revision != o.Suspicion || e.last[o.IP].rev > c.Seen) {
		return false, false, true
	}
	o.Lease = id
	e.putOwner(o, egress.Tenure{IP: o.IP, Node: o.Node, Why: o.Why})
	return true, false, false
}

// suspect is store.Client.Suspect.
func (e *etcd) suspect(s egress.Suspicion, seen int64) bool {
	id, _ := egress.ParseLease(s.Lease) // it is an agent's
	if _, there := e.suspicions[s.Node]; there || e.under[s.Node] != id || e.recordRev[s.Node] > seen {
		return false
	}
	s.Revision = e.changed()
	e.suspicions[s.Node] = s
	e.w.watchers()
	return true
}

// acquit is the second transaction of store.Lease.Confirm.
func (e *etcd) acquit(node string, id int64) bool {
	if e.under[node] != id {
		return false
	}
	if _, there := e.suspicions[node]; there {
		delete(e.suspicions, node)
		e.changed()
		e.w.watchers()
	}
	return true
}

// release is store.Client.Release.
func (e *etcd) release(o egress.Owner, unused bool) bool {
	if e.owners[o.IP].Revision != o.Revision {
		return false
	}
	delete(e.owners, o.IP)
	rev := e.changed()
	from := o.Node
	if unused {
		from = ""
	}
	e.last[o.IP] = record{egress.Tenure{IP: o.IP, Why: egress.ReasonRelease, From: from}, rev}
	e.w.watchers()
	return true
}

// handOver is store.Client.HandOver.
func (e *etcd) handOver(o egress.Owner, m egress.Move, to egress.Agent) bool {
	id, _ := egress.ParseLease(to.Lease) // 0: it has none
	if e.owners[o.IP].Revision != o.Revision || e.moves[o.IP].Revision != m.Revision || e.under[to.Node] != id || id == 0 {
		return false
	}
	delete(e.moves, o.IP)
	e.putOwner(egress.Owner{IP: o.IP, Node: to.Node, Why: egress.ReasonMove, From: o.Node, Lease: id}, egress.Tenure{IP: o.IP, Node: to.Node, From: o.Node})
	return true
}

// ready is store.Client.Ready.
func (e *etcd) ready(m egress.Move, id int64) bool {
	have, ok := e.moves[m.IP]
	if !ok || have.Revision != m.Revision {
		return false
	}
	have.Ready, have.ReadyLease = true, egress.FormatLease(id)
	have.Revision = e.changed()
	e.moves[m.IP] = have
	e.w.watchers()
	return true
}

// requestMove is what an operator does.
func (e *etcd) requestMove(ip netip.Addr, to string, ttl time.Duration) {
	if _, ok := e.moves[ip]; ok {
		return
	}
	id := e.grant(ttl)
	e.moves[ip] = egress.Move{IP: ip, To: to, Lease: id, Revision: e.changed()}
	e.w.watchers()
}

// owned is store.Lease.Owned.
func (e *etcd) owned(id int64) []netip.Addr {
	var out []netip.Addr
	for _, ip := range e.w.ips {
		if o, ok := e.owners[ip]; ok && o.Lease == id {
			out = append(out, ip)
		}
	}
	return out
}

// moveTo is the first transaction of store.Lease.MoveTo, with all keys of the lease. It asks that each is still under
// it, and that the record is as of revision seen.
func (e *etcd) moveTo(from, next int64, a egress.Agent, seen int64, ips []netip.Addr, keep func(netip.Addr) bool) bool {
	if e.under[a.Node] != from || !e.movable(from, next, a.Node, seen, ips) {
		return false
	}
	rev := e.changed()
	e.put(next, rev, ips, keep)
	for ip, m := range e.moves {
		if m.Lease == from {
			m.Lease, m.Revision = next, rev
			e.moves[ip] = m
		}
	}
	a.Lease = egress.FormatLease(next)
	e.agents[a.Node], e.under[a.Node], e.recordRev[a.Node], e.agentsRev = a, next, rev, rev
	delete(e.suspicions, a.Node)
	e.w.watchers()
	return true
}

// moveLocks is the second one, when the record is under the next lease already.
func (e *etcd) moveLocks(from, next int64, node string, seen int64, ips []netip.Addr, keep func(netip.Addr) bool) bool {
	if !e.movable(from, next, node, seen, ips) {
		return false
	}
	if len(ips) > 0 {
		e.put(next, e.changed(), ips, keep)
		e.w.watchers()
	}
	return true
}

// movable is what both ask.
func (e *etcd) movable(from, next int64, node string, seen int64, ips []netip.Addr) bool {
	for _, ip := range ips {
		if e.owners[ip].Lease != from {
			return false
		}
	}
	return e.leases[next] != nil && e.recordRev[node] == seen
}

// put writes locks under the next lease, or gives them back.
func (e *etcd) put(next, rev int64, ips []netip.Addr, keep func(netip.Addr) bool) {
	for _, ip := range ips {
		if keep(ip) {
			o := e.owners[ip]
			o.Lease, o.Revision = next, rev
			e.owners[ip] = o
			continue
		}
		e.last[ip] = record{egress.Tenure{IP: ip, Why: egress.ReasonRelease}, rev}
		delete(e.owners, ip)
	}
}

// renumber is store.Lease.Renumber.
func (e *etcd) renumber(id int64, node string, ips []netip.Addr) bool {
	if e.under[node] != id || !e.movable(id, id, node, e.recordRev[node], ips) {
		return false
	}
	rev := e.changed()
	e.put(id, rev, ips, func(netip.Addr) bool { return true })
	e.recordRev[node], e.agentsRev = rev, rev
	e.w.watchers()
	return true
}
