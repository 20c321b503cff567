package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/store"
	"github.com/egret-project/egret/vlan"
)

// Config says what an agent works with. Every field without a default in its comment must be set.
type Config struct {
	Node    string        // name of the Kubernetes node
	NodeIP  netip.Addr    // overlay endpoint; zero: the first address of the node's record in etcd
	Store   *store.Client // stays the caller's to close
	Log     *slog.Logger
	Version string // published in agents/<node>

	// Monitor is where checks of health are registered, and Metrics where what the agent counts is; nil: nowhere. Both are the caller's to serve.
	Monitor *monitor.Server
	Metrics prometheus.Registerer

	LeaseTTL   time.Duration // whole seconds; etcd raises it to its own floor
	Permit     time.Duration // for how long the kernel keeps answering when nobody renews; the same on all nodes
	ClaimDelay time.Duration // how much longer each next candidate of an IP waits
	Linger     time.Duration // for how long a former owner relays after a planned move

	// RestartGrace is for how long the kernel serves on without an agent that was told to stop; at least LeaseTTL.
	RestartGrace time.Duration

	// GossipKey is what the agents' gossip is encrypted with; nil: no gossip, and whoever dies is found dead when its lease ends. GossipPort
	// is its TCP and UDP port. Freeze keeps the IPs while all agents have lost etcd.
	GossipKey  []byte
	GossipPort int
	Freeze     bool

	Rebalance time.Duration // for how long an IP belongs elsewhere before it is moved there; 0: it stays

	Uplink string // link that all egress IPs leave by; "": the one whose subnet holds the IP, else that of NodeIP

	// HoldUnknown is for how long a pod of which the agent does not know yet whether it is selected waits with its first connection to the
	// outside; 0: not at all. It has the precision of a millisecond.
	HoldUnknown time.Duration

	RandomPorts bool // choose the source ports of SNATed connections at random

	NATLog NATLog // what is logged of connections

	ShareTables bool // let other programs write to the nftables tables, where the kernel can keep them off

	Sysctl  string // where the settings of /proc/sys/net can be written; empty: there
	Exposed string // why etcd is not spoken to by mTLS, for the record; empty: it is

	Except  []netip.Prefix // destinations that are never SNATed, on top of nodes and pod CIDRs
	Cluster []netip.Prefix // ranges of pods and Services, which are not SNATed either
}

// agent is a running agent.
type agent struct {
	Config
	view      *store.View
	cluster   *plan.Cluster // of the last pass
	tables    *nft.Tables
	router    *routing.Router
	links     *vlan.Links
	announcer *announce.Announcer
	machine   *machine
	permits   *permits
	history   *history
	probes    *probes
	drops     *drops
	ports     *ports
	natLog    *natLogger // nil: off
	flusher   *flusher
	metrics   *metrics
	features  []string       // what the record of the agent says of its kernel
	gossip    *gossip.Gossip // nil: off
	dirty     chan struct{}  // capacity 1

	// What follows belongs to the goroutine of loop.
	since       time.Time             // when the agent of this node came alive
	claimed     map[netip.Addr]bool   // claimed in the last pass, and not seen yet
	resets      map[string]int        // how often somebody reset rp_filter of a VLAN link
	announced   map[netip.Addr]string // as of the last pass that was complete
	lastFault   string                // what report logged last
	lastSkipped string                // what skipped logged last
	ready       readiness
	faultySince time.Time // since when passes cannot program everything; zero: they can

	asked     map[netip.Addr]time.Time  // since when a planned move that this node asked for is seen
	avoid     map[string]time.Time      // until when a node is asked for nothing, since it did not get ready
	misplaced map[egress.Move]time.Time // since when an IP belongs to another node
}

// ReadyCheck is the name of the agent's check of /readyz: whoever waits before Run says so under it.
const ReadyCheck = "agent"

// Run is the agent of a node: it works in the network namespace of the calling thread until ctx ends, and then leaves kernel and lease
// as they are, the locks under a lease of RestartGrace and the permits extended to its end, so that the next agent of the node carries on
// without a lost packet. An error means that the agent cannot work at all: a kernel without what it needs, a second agent on the node.
func Run(ctx context.Context, cfg Config) error {
	lock, err := lockNode()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := routing.Check(); err != nil {
		return fmt.Errorf("checking the kernel: %w", err)
	}
	a, err := open(cfg)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the agent needs CAP_NET_ADMIN and CAP_NET_RAW", err)
	}
	if err != nil {
		return err
	}
	defer a.tables.Close()
	if cfg.Monitor != nil {
		cfg.Monitor.Ready(ReadyCheck, a.ready.check)
		who := &asked{node: cfg.Node, snapshot: a.view.Snapshot, log: a.natLog,
			list: func(m egress.Mark) ([]conntrack.Flow, error) { return conntrack.Flows(m, ^egress.Mark(0)) }}
		cfg.Monitor.Page(ConnectionsPage, http.HandlerFunc(who.connections))
		cfg.Monitor.Page(LogPage, http.HandlerFunc(who.natLog))
	}
	if err := a.start(ctx); err != nil {
		return err
	}
	// These go on until the last words are said: the permits must not end meanwhile, nor the peers think that the agent is dead.
	var last errgroup.Group
	after, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		stop()
		_ = last.Wait() // they end without error
	}()
	last.Go(func() error { return a.permits.run(after, a.Log) })
	if a.machine.Bounded() {
		last.Go(func() error { return a.confirm(after) })
	}
	if a.gossip != nil {
		last.Go(func() error { return a.gossip.Run(after) })
		last.Go(func() error { return a.question(after) })
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.view.Run(gctx) })
	g.Go(func() error { return a.keepLease(gctx) })
	g.Go(func() error { return a.announcer.Run(gctx) })
	g.Go(func() error { return a.probes.run(gctx) })
	g.Go(func() error { return a.drops.run(gctx) })
	g.Go(func() error { return a.ports.run(gctx) })
	g.Go(func() error { return a.natLog.run(gctx) })
	if cfg.Monitor != nil {
		g.Go(func() error {
			if err := cfg.Monitor.ServeRoot(gctx, lock); err != nil {
				a.Log.Warn("root is not told which pod has a port", "err", err)
			}
			return nil
		})
	}
	g.Go(func() error { return a.flusher.run(gctx) })
	g.Go(func() error { return a.history.run(gctx, a.Store, a.Log) })
	watch := func(run func(context.Context, func()) error) {
		// They may open sockets: in the namespace of the thread that they happen to run on, as every thread of the agent is in it.
		g.Go(func() error { return run(gctx, a.wake) })
	}
	watch(a.tables.Watch)
	watch(routing.Watch)
	g.Go(func() (err error) {
		if a.features, err = a.look(); err != nil {
			return err
		}
		return a.loop(gctx)
	})
	err = g.Wait()
	a.lastWords(ctx) // also after an error: the kernel serves on while the agent is started again
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// lockNode keeps a second agent off the node: an abstract unix socket lives and dies with the process, and is private to the network
// namespace.
func lockNode() (net.Listener, error) {
	l, err := net.Listen("unix", Socket)
	if err != nil {
		return nil, fmt.Errorf("another egret agent runs in this network namespace: %w", err)
	}
	return l, nil
}

func open(cfg Config) (*agent, error) {
	a := &agent{
		Config: cfg,
		view:   cfg.Store.NewView(cfg.Node),
		dirty:  make(chan struct{}, 1),
		machine: newMachine(ownership.Config{
			Node: cfg.Node, Permit: cfg.Permit, ClaimDelay: cfg.ClaimDelay, Linger: cfg.Linger, Gossip: cfg.GossipKey != nil, Freeze: cfg.Freeze,
		}),
		history: newHistory(),
		asked:   map[netip.Addr]time.Time{}, avoid: map[string]time.Time{}, misplaced: map[egress.Move]time.Time{}, resets: map[string]int{},
	}
	a.flusher, a.metrics = newFlusher(a.wake), newMetrics()
	var err error
	if a.tables, err = nft.New(nft.Config{Log: cfg.Log, Shared: cfg.ShareTables}); err != nil {
		return nil, err
	}
	if a.router, err = routing.New(routing.Config{Log: cfg.Log}); err != nil {
		return nil, err
	}
	if a.links, err = vlan.New(vlan.Config{Log: cfg.Log, Sysctl: cfg.Sysctl}); err != nil {
		return nil, err
	}
	a.permits = newPermits(a.tables, a.machine, cfg.Permit, cfg.LeaseTTL)
	a.permits.metrics = a.metrics
	if cfg.GossipKey != nil {
		a.gossip = gossip.New(gossip.Config{
			Node: cfg.Node, Port: cfg.GossipPort, Key: cfg.GossipKey, Log: cfg.Log, Changed: a.wake, Receive: a.heard,
		})
	}
	a.ports = newPorts(&ports{log: cfg.Log, opened: a.tables.Opened, list: conntrack.Marked, wake: a.wake, reuses: conntrack.ReusesPorts()})
	if a.natLog, err = newNATLogger(natLogger{
		cfg: cfg.NATLog, node: cfg.Node, version: cfg.Version, log: cfg.Log, snapshot: a.view.Snapshot, metrics: a.metrics,
		listen: func() (*conntrack.Events, error) { return conntrack.Listen(egress.ConnTag, egress.ConnTagMask) },
		list:   func() ([]conntrack.Flow, error) { return conntrack.Flows(egress.ConnTag, egress.ConnTagMask) },
	}); err != nil {
		return nil, err
	}
	a.drops = &drops{log: cfg.Log, look: a.tables.Guarded, wake: a.wake, cause: a.causeOf}
	a.announcer = announce.New(announce.Config{Log: cfg.Log, Permitted: a.machine.answers, Changed: a.wake})
	a.probes = newProbes(&probes{log: cfg.Log, unused: cfg.Store.Unused, wake: a.wake,
		there: func(link string) bool { _, err := net.InterfaceByName(link); return err == nil },
		probe: func(ctx context.Context, want map[netip.Addr]string) (map[netip.Addr]announce.Conflict, error) {
			return announce.Probe(ctx, want, announce.ProbeGap)
		}})
	if cfg.Metrics != nil {
		if err := a.metrics.register(cfg.Metrics, monitor.NewReading(read(), a.readMetrics)); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return a, nil
}

// start adopts the lease of the node's former agent, with the permits that the kernel still holds, or takes a new one.
func (a *agent) start(ctx context.Context) error {
	former, err := a.Store.Agent(ctx, a.Node)
	if err != nil {
		return fmt.Errorf("reading the node's former agent: %w", err)
	}
	id, err := egress.ParseLease(former.Lease)
	if err != nil {
		return a.newLease(ctx) // there was none
	}
	l, err := a.Store.Adopt(ctx, id)
	switch {
	case errors.Is(err, store.ErrLeaseLost):
		return a.newLease(ctx)
	case err != nil:
		return fmt.Errorf("adopting lease %s: %w", former.Lease, err)
	}
	return a.adopt(ctx, l, former)
}

func (a *agent) adopt(ctx context.Context, l *store.Lease, former egress.Agent) error {
	left, err := a.tables.Permits()
	if err != nil {
		return fmt.Errorf("reading the permits of the former agent: %w", err)
	}
	if err := a.endRelays(left); err != nil {
		return err
	}
	held, err := l.Owned(ctx)
	if err != nil {
		return err
	}
	if former.Restarting {
		l, err = a.shorten(ctx, l, former, held, left)
	} else {
		held, err = renumber(ctx, l, held)
	}
	if err != nil {
		return err
	}
	a.machine.grant(l)
	a.since = former.Since
	yes, err := l.Confirm(ctx, a.Node)
	if err != nil {
		return err
	}
	a.machine.step(ownership.Confirmed{Lease: l.ID(), Sent: yes.Sent, Restores: yes.Restores})
	n := a.resume(held, left, former)
	a.Log.Info("lease adopted", "lease", former.Lease, "dur", l.TTL(), "egress_ips", n)
	return nil
}

// endRelays ends the permits that are not to answer, and takes them out of left: what the former agent only relayed it may have given away.
func (a *agent) endRelays(left map[netip.Addr]time.Duration) error {
	answering, err := a.tables.Answering()
	if err != nil {
		return fmt.Errorf("reading the permits of the former agent: %w", err)
	}
	var relayed []netip.Addr
	for ip := range left {
		if !answering[ip] {
			relayed = append(relayed, ip)
			delete(left, ip)
		}
	}
	return a.tables.Revoke(relayed...)
}

// renumber gives the locks new revisions: what the former agent has sent, a hand-over or a release, may arrive yet. Some may arrive meanwhile.
func renumber(ctx context.Context, l *store.Lease, held []netip.Addr) ([]netip.Addr, error) {
	for again := 3; ; again-- {
		err := l.Renumber(ctx, held)
		if !errors.Is(err, store.ErrChanged) || again == 0 {
			return held, err
		}
		if held, err = l.Owned(ctx); err != nil {
			return nil, err
		}
	}
}

// resume renews the permits that the kernel still has for what this node holds, at once: the former agent may have been killed. What it was
// the relay for it is not any more. It returns how many those are.
func (a *agent) resume(held []netip.Addr, left map[netip.Addr]time.Duration, former egress.Agent) int {
	var list []nft.Permit
	var ips []netip.Addr
	for _, ip := range held {
		if left[ip] > 0 {
			list, ips = append(list, nft.Permit{IP: ip, Answer: true}), append(ips, ip)
			delete(left, ip)
		}
	}
	a.machine.step(ownership.Adopted{IPs: ips, Revocable: former.Revocable, Permit: time.Duration(former.Permit)})
	err := a.tables.Revoke(slices.Collect(maps.Keys(left))...)
	if len(list) > 0 {
		err = errors.Join(err, a.permits.grant(list))
	}
	if err != nil {
		a.Log.Warn("permits of the former agent not renewed; the first pass does that", "err", err) // the tables may be damaged
	}
	return len(ips)
}

// shorten moves the locks from a lease that was to outlive the restart to one of the usual length. No permit may outlive that, even if this
// process ends on the way: so the permits, of which left is how long they last, are cut first.
func (a *agent) shorten(ctx context.Context, l *store.Lease, former egress.Agent, held []netip.Addr, left map[netip.Addr]time.Duration) (*store.Lease, error) {
	next, err := a.Store.Grant(ctx, a.LeaseTTL)
	if err != nil {
		return nil, err
	}
	most := time.Until(next.Valid())
	var cut []nft.Permit
	for _, ip := range held {
		if left[ip] > most {
			cut = append(cut, nft.Permit{IP: ip, Answer: true})
		}
	}
	if len(cut) > 0 {
		if err := a.tables.Permit(cut, most); err != nil {
			return nil, fmt.Errorf("cutting the permits of the former agent: %w", err)
		}
	}
	return next, l.MoveTo(ctx, next, former, func(netip.Addr) bool { return true })
}

func (a *agent) newLease(ctx context.Context) error {
	l, err := a.Store.Grant(ctx, a.LeaseTTL)
	if err != nil {
		return fmt.Errorf("taking a lease: %w", err)
	}
	a.machine.grant(l)
	a.Log.Info("lease taken", "lease", egress.FormatLease(l.ID()), "dur", l.TTL())
	return nil
}

// keepLease renews the lease, and takes a new one when etcd has dropped it: every lock is gone then, and so are the permits.
func (a *agent) keepLease(ctx context.Context) error {
	for {
		lease := a.machine.current()
		err := lease.Run(ctx, func(sent time.Time, ttl time.Duration) {
			a.machine.step(ownership.Renewed{Lease: lease.ID(), Sent: sent, TTL: ttl})
		}, a.wake)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrLeaseLost) {
			return fmt.Errorf("keeping the lease: %w", err)
		}
		a.metrics.add(metricLost, 1)
		a.Log.Warn("lease lost", "lease", egress.FormatLease(lease.ID()))
		if err := a.tell(ownership.Lost{Lease: lease.ID()}); err != nil {
			a.Log.Warn("permits not withdrawn; they end by themselves", "err", err)
		}
		for wait := 100 * time.Millisecond; ; wait = min(2*wait, time.Second) {
			if err := a.newLease(ctx); err == nil {
				break
			}
			if !sleep(ctx, wait) {
				return nil
			}
		}
		a.wake()
	}
}

// confirm asks etcd again and again whether the lease is still there, for permits that are bounded by the answer.
func (a *agent) confirm(ctx context.Context) error {
	// Nobody waits for a question that hangs, as with a member of etcd that is stuck: the next one goes to another member.
	var asking errgroup.Group
	asking.SetLimit(5)
	defer func() { _ = asking.Wait() }() // what failed is seen by the permits that end
	for {
		asking.TryGo(func() error {
			try, cancel := context.WithTimeout(ctx, a.Permit)
			defer cancel()
			lease := a.machine.current()
			yes, err := lease.Confirm(try, a.Node)
			switch {
			case err == nil:
				a.machine.step(ownership.Confirmed{Lease: lease.ID(), Sent: yes.Sent, Restores: yes.Restores})
				a.metrics.took(metricQuestion, time.Since(yes.Sent))
				return nil
			case ctx.Err() == nil:
				a.metrics.add(metricNoAnswer, 1)
			}
			if errors.Is(err, store.ErrLeaseLost) {
				return a.tell(ownership.Lost{Lease: lease.ID()})
			}
			return nil // not known: the permits say when they are not renewed, keepLease when the lease is lost
		})
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(a.machine.Length() / 5):
		}
	}
}

// wake marks the loop dirty. It never blocks.
func (a *agent) wake() {
	select {
	case a.dirty <- struct{}{}:
	default:
	}
}

// loop runs passes until ctx ends: one for each trigger, and one again, later and later, after a pass that failed.
func (a *agent) loop(ctx context.Context) error {
	// The lower bound keeps a fault that mends itself from being felt, the upper one a fault that stays from filling the log.
	const minBackoff, maxBackoff = 50 * time.Millisecond, 5 * time.Second
	backoff := minBackoff
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.dirty:
		case <-a.view.Changed():
		case <-timer.C:
		}
		a.metrics.came(a.view.Arrived())
		began := time.Now()
		next, err := a.pass(ctx)
		a.metrics.passed(time.Since(began), err, a.machine.InUse())
		err = errors.Join(err, a.publishFaults(ctx, err))
		a.report(ctx, err)
		if a.view.Snapshot() != nil && a.ready.passed(err) { // without a snapshot, a pass has nothing to do
			a.wake() // the record is to say so
		}
		wait := time.Until(next)
		if next.IsZero() {
			wait = time.Hour
		}
		if err != nil {
			wait = min(max(wait, 0), backoff)
			backoff = min(2*backoff, maxBackoff)
		} else {
			backoff = minBackoff
		}
		timer.Reset(wait)
	}
}

// report logs a fault when it comes, changes, and goes: not on every pass.
func (a *agent) report(ctx context.Context, err error) {
	fault := ""
	if err != nil && ctx.Err() == nil {
		fault = err.Error()
	}
	if fault == a.lastFault {
		return
	}
	if a.lastFault = fault; fault != "" {
		a.Log.Warn("pass incomplete, will retry", "err", err)
	} else {
		a.Log.Info("pass complete again")
	}
}

// lastWords moves the locks to a lease that outlives a restart, which peers may not revoke, and extends the permits to its end: nobody can
// claim before that, so the kernel may serve on alone until the next agent adopts both.
func (a *agent) lastWords(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if s := a.view.Snapshot(); s != nil && plan.Gone(s, a.Node) {
		// No agent comes back to a node that is gone.
		a.machine.begin(a.cluster.With(s))
		if err := a.letGo(ctx); err != nil {
			a.Log.Warn("egress IPs of a node that is gone not let go", "err", err)
		}
	}
	lease, moved, err := a.lengthen(ctx)
	if err != nil {
		a.Log.Warn("locks not kept for the next agent: traffic stops until it runs", "err", err)
		return
	}
	left, err := a.permits.extend(lease, moved)
	if err != nil {
		a.Log.Warn("permits not extended: traffic stops until the next agent runs", "err", err)
		return
	}
	a.Log.Info("stopped; kernel and lease stay for the next agent", "dur", left)
}

// lengthen moves the locks to a lease that outlives a restart, and returns of which egress IPs.
func (a *agent) lengthen(ctx context.Context) (next *store.Lease, moved []netip.Addr, err error) {
	r, err := a.Store.Agent(ctx, a.Node)
	if err != nil {
		return nil, nil, err
	}
	grace := max(a.LeaseTTL, a.RestartGrace)
	var cluster *plan.Cluster
	if s := a.view.Snapshot(); s != nil {
		cluster = a.cluster.With(s)
		if plan.Cordoned(s, a.Node) {
			grace = a.LeaseTTL // the node is about to go, and others can take what it still holds
		}
	}
	if next, err = a.Store.Grant(ctx, grace); err != nil {
		return nil, nil, err
	}
	r.Node, r.Restarting, r.Revocable, r.Suspectable = a.Node, true, false, false
	err = a.machine.current().MoveTo(ctx, next, r, func(ip netip.Addr) bool {
		if a.machine.keeps(ip) {
			moved = append(moved, ip)
			return true
		}
		// One that came just now would wait for the next agent: others can use it at once.
		return cluster == nil || cluster.PoolOf(ip) == ""
	})
	return next, moved, err
}

// look checks the node, logs what is amiss, and returns what the record of the agent says of its kernel.
func (a *agent) look() ([]string, error) {
	findings, err := check.Run(a.NodeIP)
	if err != nil {
		return nil, err
	}
	for _, f := range findings {
		if f.Check == check.Untried { // the agent's container is not to be able to
			a.Log.Info("check", "name", f.Check, "found", f.Found)
		} else if f.Level != check.OK {
			a.Log.Warn("check", "name", f.Check, "found", f.Found, "for", f.For, "consequence", f.Consequence)
		}
	}
	return append([]string{"linux-" + findings[0].Found, runtime.GOARCH}, check.Names(findings)...), nil
}

// sleep waits for d; false: ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
