package agent

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// Bounds of durations in seconds: a planned move takes hundredths, a take-over half a second and a permit, and etcd a
// thousandth where all is well.
var (
	takeBuckets   = []float64{.02, .05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10, 20, 40}
	shortBuckets  = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}
	marginBuckets = []float64{0, .025, .05, .1, .15, .2, .25, .3, .4, .5, 1, 10}
)

// What an agent tells of itself, of the egress IPs that it serves, and of those that its pods use. No metric has a
// label for a pod.
var (
	metricOwned = monitor.Metric{Name: "egret_egress_owned", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "1 for each egress IP whose lock this node has and uses."}
	metricTakeover = monitor.Metric{Name: "egret_takeover_duration_seconds", Type: monitor.Histogram, Labels: []string{"cause"}, Buckets: takeBuckets,
		Help: "How long it took until this node used an egress IP, by the cause: claim, nobody had held it; crash, its owner had died; release, its owner " +
			"had given it up; move, drain, rebalance, it was handed over; static, the address is the node's. It counts from when this agent saw that the IP " +
			"had no living owner, or that it was asked to take it; for a death, a third of a second after it."}
	metricReleases = monitor.Metric{Name: "egret_releases_total", Type: monitor.Counter, Labels: []string{"cause"},
		Help: "Egress IPs that this node gave up, by the cause: release, it might not or could not serve it; move, drain, rebalance, it handed it over."}
	metricRevoked = monitor.Metric{Name: "egret_leases_revoked_total", Type: monitor.Counter,
		Help: "Leases that this agent ended since their agents were dead or their nodes gone."}
	metricLost = monitor.Metric{Name: "egret_leases_lost_total", Type: monitor.Counter,
		Help: "How often etcd dropped this agent's own lease: all its egress IPs went then."}
	metricMargin = monitor.Metric{Name: "egret_permit_margin_seconds", Type: monitor.Histogram, Buckets: marginBuckets,
		Help: "What was left of the node's permits when they were renewed. At 0 the node falls silent. Renewals are every quarter of --permit."}
	metricRenewals = monitor.Metric{Name: "egret_permit_renewals_total", Type: monitor.Counter, Labels: []string{"how"},
		Help: "Renewals of permits: frames, without a commit; commit, by a transaction of nftables, which makes others read the ruleset anew; failed."}
	metricQuestion = monitor.Metric{Name: "egret_etcd_question_duration_seconds", Type: monitor.Histogram, Buckets: shortBuckets,
		Help: "How long etcd took to say that the lease of this agent is there. Only with the gossip is it asked."}
	metricNoAnswer = monitor.Metric{Name: "egret_etcd_questions_failed_total", Type: monitor.Counter,
		Help: "Such questions that got no answer within --permit, or another answer."}
	metricWatch = monitor.Metric{Name: "egret_etcd_watch_up", Type: monitor.Gauge,
		Help: "1 while this agent follows the changes in etcd."}
	metricPass = monitor.Metric{Name: "egret_pass_duration_seconds", Type: monitor.Histogram, Buckets: shortBuckets,
		Help: "How long a pass of the agent took: it looks at etcd and the kernel, and makes the kernel as it is to be."}
	metricPassFailed = monitor.Metric{Name: "egret_passes_failed_total", Type: monitor.Counter,
		Help: "Passes that could not do all that was to be done; they are tried again."}
	metricToKernel = monitor.Metric{Name: "egret_change_to_kernel_seconds", Type: monitor.Histogram, Buckets: shortBuckets,
		Help: "From when a change in etcd came to this agent, as that a pod is selected, until the kernel had it; of changes for which the kernel was written to."}
	metricKernel = monitor.Metric{Name: "egret_kernel_changes_total", Type: monitor.Counter, Labels: []string{"part"},
		Help: "Changes that were written to the kernel: addresses, routes, nftables. A steady state writes nothing."}
	metricResets = monitor.Metric{Name: "egret_rp_filter_resets_total", Type: monitor.Counter, Labels: []string{"link"},
		Help: "How often somebody set rp_filter of a VLAN link of Egret's, and it was set back."}
	metricDegraded = monitor.Metric{Name: "egret_degraded", Type: monitor.Gauge, Labels: []string{"part"},
		Help: "1 for each part that the node could not program in the last pass: addresses, conntrack, fast path, nftables, node, permits, pods, routes, uplink, VLAN links; " +
			"other for what is of none."}
	metricConflict = monitor.Metric{Name: "egret_egress_conflict", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "1 for each egress IP that a host outside the cluster uses, as far as this node heard."}
	metricDropping = monitor.Metric{Name: "egret_egress_dropping", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "1 for each egress IP of which this node drops packets since something on it gives them another source or way."}
	metricRefused = monitor.Metric{Name: "egret_pool_refused", Type: monitor.Gauge, Labels: []string{"pool"},
		Help: "1 for each pool whose IPs this node cannot hold, as where another link has the VLAN."}
	metricGossip = monitor.Metric{Name: "egret_gossip_members", Type: monitor.Gauge, Labels: []string{"state"},
		Help: "The other agents that etcd shows, by what the gossip knows of them: alive, dead, left, unknown. Only with the gossip."}
	metricSentPackets = monitor.Metric{Name: "egret_egress_sent_packets_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Packets that left this node, as the gateway, with the egress IP as their source, those of all nodes' pods. Of packets that a network card cuts up, the whole is one."}
	metricSentBytes = monitor.Metric{Name: "egret_egress_sent_bytes_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Bytes of these packets, from the IP header on."}
	metricReceivedPackets = monitor.Metric{Name: "egret_egress_received_packets_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Packets that came to this node for the egress IP, those that it dropped then included."}
	metricReceivedBytes = monitor.Metric{Name: "egret_egress_received_bytes_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Bytes of these packets, from the IP header on."}
	metricOpened = monitor.Metric{Name: "egret_egress_connections_opened_total", Type: monitor.Counter, Labels: []string{"egress_ip"},
		Help: "Connections that this node's pods opened, or tried to, by the egress IP, whatever node is the gateway. It begins anew after an hour without one."}
	metricPorts = monitor.Metric{Name: "egret_egress_ports", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "Ports in the block that new connections of this node's pods by the egress IP get theirs of."}
	metricPortsUsed = monitor.Metric{Name: "egret_egress_ports_used", Type: monitor.Gauge, Labels: []string{"egress_ip"},
		Help: "How many of these were in use to the busiest destination when that was last counted: every 2 minutes, and as soon as it may be more than three quarters."}
	metricDropped = monitor.Metric{Name: "egret_dropped_packets_total", Type: monitor.Counter, Labels: []string{"reason"},
		Help: "Packets that Egret's tables on this node dropped, by the counter of `nft list counters table inet egret`; docs/design.md says what each is for."}
	metricFast = monitor.Metric{Name: "egret_fast_path_packets_total", Type: monitor.Counter, Labels: []string{"step"},
		Help: "What the programs of --fast-path did with packets, since the agent started: forwarded, sent on from another node; wrapped, sent to another node; " +
			"unwrapped, taken out of the overlay and left to the tables; failed, dropped as the kernel could not do one of these."}
)

var (
	metricLogLines = monitor.Metric{Name: "egret_nat_log_lines_total", Type: monitor.Counter,
		Help: "Lines that were written to the log of connections (--nat-log)."}
	metricLogLost = monitor.Metric{Name: "egret_nat_log_lost_total", Type: monitor.Counter, Labels: []string{"reason"},
		Help: "Lines that are missing in the log of connections: socket, the agent did not read the kernel's events in time; queue, lines came faster than " +
			"they were written; write, they could not be written, as on a full disk. The log itself says so as well."}
)

// Metrics returns all that an agent tells, in the order of the documentation.
func Metrics() []monitor.Metric { return append(counted(), read()...) }

// counted are those that the agent counts, read are those that are read when they are asked for.
func counted() []monitor.Metric {
	return []monitor.Metric{metricTakeover, metricReleases, metricRevoked, metricLost, metricMargin, metricRenewals, metricQuestion, metricNoAnswer, metricPass,
		metricPassFailed, metricToKernel, metricKernel, metricResets, metricLogLines, metricLogLost}
}

func read() []monitor.Metric {
	return []monitor.Metric{metricOwned, metricDegraded, metricWatch, metricGossip, metricConflict, metricDropping, metricRefused, metricSentPackets,
		metricSentBytes, metricReceivedPackets, metricReceivedBytes, metricOpened, metricPorts, metricPortsUsed, metricDropped, metricFast}
}

// metrics is what an agent counts. A nil *metrics counts nothing.
type metrics struct {
	counts *monitor.Counts

	mu       sync.Mutex // guards what follows
	owned    []netip.Addr
	degraded []string

	// What follows belongs to the goroutine of loop.
	begun map[netip.Addr]time.Time // since when an IP has no living owner, or is to come here
	last  map[netip.Addr]string    // the living owner that an IP had last, elsewhere
	taken map[netip.Addr]egress.Owner
	seen  seen
	wrote bool      // to the kernel, in this reconcile
	since time.Time // when the oldest change came that the kernel does not have yet
}

func newMetrics() *metrics {
	m := &metrics{counts: monitor.NewCounts(counted()), begun: map[netip.Addr]time.Time{}, last: map[netip.Addr]string{}, taken: map[netip.Addr]egress.Owner{}}
	for _, how := range []string{"frames", "commit", "failed"} {
		m.add(metricRenewals, 0, how)
	}
	for _, part := range []string{"addresses", "routes", "nftables"} {
		m.add(metricKernel, 0, part)
	}
	// Prometheus sees no increase in a series that begins with 1: no alert would fire for the first.
	for _, why := range []egress.Reason{egress.ReasonClaim, egress.ReasonCrash, egress.ReasonRelease} {
		m.counts.Begin(metricTakeover, string(why))
	}
	return m
}

// register makes all metrics of the agent known. An error: another one has them there.
func (m *metrics) register(to prometheus.Registerer, reading *monitor.Reading) error {
	return errors.Join(to.Register(m.counts), to.Register(reading))
}

// add counts n more.
func (m *metrics) add(d monitor.Metric, n int, labels ...string) {
	if m != nil {
		m.counts.Add(d, n, labels...)
	}
}

// took notes that something took so long.
func (m *metrics) took(d monitor.Metric, long time.Duration, labels ...string) {
	if m != nil {
		m.counts.Took(d, long, labels...)
	}
}

// arrivals notes since when each egress IP has no living owner, or is on its way to this node.
func (m *metrics) arrivals(r *round, node string, dead func(string) bool) {
	if m == nil {
		return
	}
	if r.Partial { // this node takes over nothing
		m.begun, m.last, m.seen = map[netip.Addr]time.Time{}, map[netip.Addr]string{}, seen{}
		return
	}
	if m.seen.still(r.Snapshot, dead) {
		return
	}
	died, begun := map[string]bool{}, map[netip.Addr]time.Time{}
	note := func(ip netip.Addr) {
		if begun[ip] = m.begun[ip]; begun[ip].IsZero() {
			begun[ip] = r.now
		}
	}
	for _, e := range r.Egresses {
		for _, a := range e.Addresses {
			o, owned := r.Owners[a.IP]
			if owned && o.Node == node {
				begun[a.IP] = m.begun[a.IP] // until it is used
				continue
			}
			if !owned {
				note(a.IP)
				continue
			}
			gone, asked := died[o.Node]
			if !asked {
				gone = dead(o.Node)
				died[o.Node] = gone
			}
			m.last[a.IP] = o.Node
			if gone || r.Moves[a.IP].To == node {
				note(a.IP)
			}
		}
	}
	m.begun, m.seen = begun, seen{r.Egresses, r.Owners, r.Moves, died}
	maps.DeleteFunc(m.last, func(ip netip.Addr, _ string) bool {
		_, owned := r.Owners[ip]
		_, begun := begun[ip]
		return !owned && !begun
	})
}

// seen is what arrivals followed from.
type seen struct {
	egresses map[string]egress.Policy
	owners   map[netip.Addr]egress.Owner
	moves    map[netip.Addr]egress.Move
	died     map[string]bool // of the owners, who was dead; nil: nothing was seen
}

// still reports whether nothing of that has changed.
func (w seen) still(s *egress.Snapshot, dead func(string) bool) bool {
	if w.died == nil || !plan.Same(s.Egresses, w.egresses) || !plan.Same(s.Owners, w.owners) || !plan.Same(s.Moves, w.moves) {
		return false
	}
	for node, died := range w.died {
		if dead(node) != died {
			return false
		}
	}
	return true
}

// takes notes that this node is about to use an IP. What it used before this agent began has no beginning.
func (m *metrics) takes(o egress.Owner) {
	if m != nil {
		m.taken[o.IP] = o
	}
}

// programmed notes what the kernel has after a reconcile: all that was wanted, or not.
func (m *metrics) programmed(whole bool, now time.Time) {
	if m == nil {
		return
	}
	if whole {
		for ip, o := range m.taken {
			if begun := m.begun[ip]; !begun.IsZero() {
				why, _ := m.cause(o)
				m.took(metricTakeover, now.Sub(begun), why)
			}
			delete(m.begun, ip)
			delete(m.last, ip)
		}
		clear(m.taken)
		if m.wrote && !m.since.IsZero() {
			m.took(metricToKernel, now.Sub(m.since))
		}
		m.since = time.Time{}
	}
	m.wrote = false
}

// cause says why an IP came here, and from which node; "": from none, or that is not known.
func (m *metrics) cause(o egress.Owner) (why, from string) {
	last := ""
	if m != nil {
		last = m.last[o.IP]
	}
	switch {
	case o.Why != egress.ReasonClaim:
		return string(o.Why), o.From
	case o.From != "":
		return string(egress.ReasonRelease), o.From
	case last != "":
		return string(egress.ReasonCrash), last
	}
	return string(egress.ReasonClaim), ""
}

// changes counts n changes that are about to be, or were, written to a part of the kernel.
func (m *metrics) changes(part string, n int) {
	if m != nil && n > 0 {
		m.add(metricKernel, n, part)
		m.wrote = true
	}
}

// renewed notes how permits that would have lasted for left were renewed.
func (m *metrics) renewed(left time.Duration, err, slow error) {
	how := "frames"
	if err != nil {
		how = "failed"
	} else if slow != nil {
		how = "commit"
	}
	m.add(metricRenewals, 1, how)
	m.took(metricMargin, max(left, 0))
}

// came notes since when there are changes that the kernel does not have yet; the zero Time: there are no others.
func (m *metrics) came(since time.Time) {
	if m != nil {
		m.since = earlier(m.since, since)
	}
}

// reconciled notes how a reconcile went.
func (m *metrics) reconciled(long time.Duration, err error, owned []netip.Addr) {
	if m == nil {
		return
	}
	m.took(metricPass, long)
	var degraded []string
	if err != nil {
		m.add(metricPassFailed, 1)
		if degraded = slices.Sorted(maps.Keys(faults(err))); len(degraded) == 0 {
			degraded = []string{"other"}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.degraded, m.owned = degraded, owned
}

// readMetrics puts what is read when it is asked for: from the kernel, and from what the parts of the agent know. It
// takes none of reconcile's time.
func (a *agent) readMetrics(put func(d monitor.Metric, value float64, labels ...string)) error {
	a.metrics.mu.Lock()
	degraded, owned := a.metrics.degraded, a.metrics.owned
	a.metrics.mu.Unlock()
	one := func(d monitor.Metric, label string) { put(d, 1, label) }
	for _, part := range degraded {
		one(metricDegraded, part)
	}
	for _, ip := range owned {
		one(metricOwned, ip.String())
	}
	watching := 0.0
	if a.view.Healthy() {
		watching = 1
	}
	put(metricWatch, watching)
	conflicts := a.announcer.Conflicts()
	maps.Copy(conflicts, a.probes.conflicts())
	for ip := range conflicts {
		one(metricConflict, ip.String())
	}
	for ip := range a.drops.why() {
		one(metricDropping, ip.String())
	}
	if a.gossip != nil {
		members := map[gossip.State]int{gossip.Alive: 0, gossip.Dead: 0, gossip.Left: 0, gossip.Unknown: 0}
		if s := a.view.Snapshot(); s != nil {
			for peer := range s.Agents {
				if peer != a.Node {
					members[a.gossip.State(peer)]++
				}
			}
		}
		for state, n := range members {
			put(metricGossip, float64(n), state.String())
		}
	}
	for ip, n := range a.ports.counts() {
		put(metricPorts, float64(n.block.Size), ip.String())
		put(metricPortsUsed, float64(n.most), ip.String())
	}
	ips := map[egress.ID]netip.Addr{}
	if s := a.view.Snapshot(); s != nil {
		for _, e := range s.Egresses {
			for _, addr := range e.Addresses {
				ips[addr.ID] = addr.IP
			}
		}
		for pool := range s.Agents[a.Node].Refused {
			one(metricRefused, pool)
		}
	}
	return readKernel(a.tables, a.fast, ips, put)
}

// readKernel puts what the tables have counted, and the fast path.
func readKernel(tables *nft.Tables, fast *fastpath.Path, ips map[egress.ID]netip.Addr, put func(d monitor.Metric, value float64, labels ...string)) error {
	passed, err1 := traffic(tables, fast)
	for ip, n := range passed {
		label := ip.String()
		put(metricSentPackets, float64(n.SentPackets), label)
		put(metricSentBytes, float64(n.SentBytes), label)
		put(metricReceivedPackets, float64(n.ReceivedPackets), label)
		put(metricReceivedBytes, float64(n.ReceivedBytes), label)
	}
	opened, err2 := tables.Opened()
	for id, n := range opened {
		if ip, known := ips[id]; known { // else the egress is gone
			put(metricOpened, float64(n), ip.String())
		}
	}
	dropped, err3 := tables.Counters()
	for reason, n := range dropped {
		put(metricDropped, float64(n), reason)
	}
	steps, err4 := fast.Steps()
	for step, n := range map[string]uint64{"forwarded": steps.Forwarded, "wrapped": steps.Wrapped, "unwrapped": steps.Unwrapped, "failed": steps.Failed} {
		if fast != nil {
			put(metricFast, float64(n), step)
		}
	}
	return errors.Join(err1, err2, err3, err4)
}
