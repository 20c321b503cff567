package ownership

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
)

// world is a simulated cluster: etcd, network, kernels and clocks. All of it follows from a seed. Times are true time
// since the beginning.
type world struct {
	*rand.Rand
	opt   options
	now   time.Duration
	queue queue
	seq   int
	etcd  *etcd
	term  int64 // of the last restored etcd
	nodes []*node
	ips   []netip.Addr
	base  *egress.Snapshot // what never changes
	cut   map[[2]int]bool  // from, to: node numbers, etcdEnd is etcd
	// lasting is what stays cut when the faults have ended.
	lasting map[[2]int]bool
	backup  *etcd
	writes  int           // to etcd
	words   int           // from agent to agent
	wait    int           // until how many effects from now something happens to who has it; 0: nothing
	at      effectKind    // of those
	end     time.Duration // of the faults
	healed  bool          // nothing happens to anybody any more
	broken  *node         // but that this one stays as it is; nil: none

	violation string
	story     *strings.Builder // nil: nobody reads it
}

// etcdEnd is etcd's number in world.cut.
const etcdEnd = -1

// options say what a schedule may contain.
type options struct {
	nodes    int
	faults   time.Duration // for how long there are faults
	noGossip bool
	mixedP   bool
	restores bool
	labels   bool         // the pool selects some of the nodes, and others later
	versions bool         // some agents know no suspicions, and are newer ones when they start again
	focus    string       // what half of the faults are about
	toggle   bool         // gossip, at the start of an agent
	script   func(*world) // instead of random faults
	noChecks bool
	// noLongest: etcd does not take the longest P, so nobody knows of it.
	noLongest bool
}

type event struct {
	at  time.Duration
	seq int
	do  func()
}

type queue []event

func (q queue) before(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}

// push and pop are those of container/heap, without its allocations.
func (q *queue) push(e event) {
	*q = append(*q, e)
	h := *q
	for i := len(h) - 1; i > 0; {
		up := (i - 1) / 2
		if !h.before(i, up) {
			break
		}
		h[i], h[up] = h[up], h[i]
		i = up
	}
}

func (q *queue) pop() event {
	h := *q
	e, last := h[0], len(h)-1
	h[0], h[last] = h[last], event{}
	h = h[:last]
	*q = h
	for i := 0; ; {
		c := 2*i + 1
		if c >= last {
			return e
		}
		if c+1 < last && h.before(c+1, c) {
			c++
		}
		if !h.before(c, i) {
			return e
		}
		h[i], h[c] = h[c], h[i]
		i = c
	}
}

// The lengths of a simulated cluster: those of a real one, with a shorter lease.
const (
	permitLength = 500 * time.Millisecond
	claimDelay   = 200 * time.Millisecond
	lingerTime   = time.Second
	leaseTTL     = 3 * time.Second
	restartGrace = 6 * time.Second
	lateTime     = 3100 * time.Millisecond // it is sent within a second, and takes 2 s at most
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newWorld(seed uint64, opt options) *world {
	w := &world{Rand: rand.New(rand.NewPCG(seed, 0x6567726574)), opt: opt, cut: map[[2]int]bool{}, lasting: map[[2]int]bool{}}
	w.ips = []netip.Addr{netip.MustParseAddr("10.10.0.11")}
	if w.N(4) == 0 {
		w.ips = append(w.ips, netip.MustParseAddr("10.10.0.12"))
	}
	w.base = &egress.Snapshot{
		Pools: map[string]egress.Pool{"pool": {Name: "pool"}}, Egresses: map[string]egress.Policy{}, Nodes: map[string]egress.Node{},
	}
	for i, ip := range w.ips {
		name := fmt.Sprintf("egress-%d", i)
		w.base.Egresses[name] = egress.Policy{Name: name, Addresses: []egress.Address{{IP: ip, ID: egress.ID(i + 1), Pool: "pool"}}, Created: epoch.Add(time.Duration(i))}
	}
	w.etcd = &etcd{
		w: w, rev: 10, owners: map[netip.Addr]egress.Owner{}, agents: map[string]egress.Agent{}, under: map[string]int64{}, moves: map[netip.Addr]egress.Move{},
		last: map[netip.Addr]record{}, leases: map[int64]*lease{}, nextID: 100, recordRev: map[string]int64{}, suspicions: map[string]egress.Suspicion{},
	}
	for i := range opt.nodes {
		n := &node{w: w, id: i, name: string(rune('A' + i)), permit: permitLength, grace: restartGrace, gossip: !opt.noGossip}
		n.offset = time.Duration(w.Int64N(int64(1000 * time.Hour)))
		n.drift = w.Float64()*0.01 - 0.005
		n.kernel.n, n.old = n, opt.versions && w.chance(2)
		w.base.Nodes[n.name] = egress.Node{Name: n.name, Index: i + 1, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 10, 0, byte(101 + i)})}}
		n.heard = make([]gossipState, opt.nodes)
		w.nodes = append(w.nodes, n)
	}
	if opt.labels {
		gateways := egress.Selector{MatchExpressions: []egress.Requirement{{Key: gateway, Operator: "Exists"}}}
		w.base.Pools["pool"] = egress.Pool{Name: "pool", NodeSelector: gateways}
		w.label(w.nodes[:1+w.N(len(w.nodes)-1)], true)
	}
	return w
}

// gateway is the label of the nodes that the pool selects, where it does not select all.
const gateway = "gateway"

// label makes nodes gateways, or ordinary ones, for all that watch etcd.
func (w *world) label(nodes []*node, is bool) {
	all := maps.Clone(w.base.Nodes) // a snapshot that was taken never changes
	for _, n := range nodes {
		r := all[n.name]
		if r.Labels = nil; is {
			r.Labels = map[string]string{gateway: ""}
		}
		all[n.name] = r
		w.say("operator: %s is a gateway: %t", n.name, is)
	}
	w.base.Nodes = all
	w.etcd.changed()
	w.watchers()
}

// N returns a number below n.
func (w *world) N(n int) int { return w.IntN(n) }

// chance is true once in n times.
func (w *world) chance(n int) bool { return w.IntN(n) == 0 }

// between returns a duration from a to b.
func (w *world) between(a, b time.Duration) time.Duration {
	return a + time.Duration(w.Int64N(int64(b-a)+1))
}

// after calls do in d.
func (w *world) after(d time.Duration, do func()) {
	w.seq++
	w.queue.push(event{w.now + max(d, 0), w.seq, do})
}

func (w *world) run(until time.Duration) {
	for len(w.queue) > 0 && w.queue[0].at <= until && w.violation == "" {
		e := w.queue.pop()
		w.now = e.at
		e.do()
	}
	w.now = max(w.now, until)
}

func (w *world) say(format string, args ...any) {
	if w.story != nil {
		fmt.Fprintf(w.story, "%9.3f  "+format+"\n", append([]any{w.now.Seconds()}, args...)...)
	}
}

func (w *world) fail(format string, args ...any) {
	if w.violation == "" {
		w.violation = fmt.Sprintf(format, args...)
		w.say("VIOLATION: %s", w.violation)
	}
}

// expire ends a lease when its time has come by etcd's clock, at once or a little later.
func (w *world) expire(id int64) {
	l, e := w.etcd.leases[id], w.etcd
	term := e.term
	w.after(l.expires-w.now+w.between(0, 20*time.Millisecond)*time.Duration(w.N(2)), func() {
		l := w.etcd.leases[id]
		switch {
		case w.etcd.term != term || l == nil:
		case w.etcd.down: // it comes back with the whole life ahead
			l.expires = w.now + l.ttl
			w.expire(id)
		case w.now < l.expires:
			w.expire(id)
		default:
			w.say("etcd: lease %x has ended", id)
			w.etcd.revoke(id)
		}
	})
}

// watchers sends what etcd is now to all that watch it.
func (w *world) watchers() {
	for _, n := range w.nodes {
		n.watch()
	}
}

// reaches reports whether packets pass from a to b.
func (w *world) reaches(a, b int) bool { return !w.cut[[2]int{a, b}] && !w.lasting[[2]int{a, b}] }

// check looks at the kernels when one of them has got a permit: no two may answer for one IP.
func (w *world) check(n *node, ip netip.Addr) {
	if w.opt.noChecks || !n.kernel.answers(ip) {
		return
	}
	for _, o := range w.nodes {
		if o != n && o.kernel.answers(ip) && !n.unsure() && !o.unsure() {
			w.fail("%s and %s both answer for %s: %s for %v more, %s for %v more", n.name, o.name, ip,
				n.name, (n.kernel.until - w.now).Round(time.Millisecond), o.name, (o.kernel.until - w.now).Round(time.Millisecond))
		}
	}
}
