package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/inject"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/store"
)

// Config says what an agent works with. Every field without a default in its comment must be set.
type Config struct {
	Node    string     // name of the Kubernetes node
	NodeIP  netip.Addr // overlay endpoint; zero: the first address of the node's record in etcd
	Version string     // published in agents/<node>
	Exposed string     // why etcd is not spoken to by mTLS, published too; empty: it is
	Log     *slog.Logger
	Store   *store.Client // stays the caller's to close

	// Monitor is where checks of health are registered, and Metrics where what the agent counts is; nil: nowhere. Both
	// are the caller's to serve.
	Monitor *monitor.Server
	Metrics prometheus.Registerer

	Timing
	Network
	Gossip Gossip
	NATLog NATLog // what is logged of connections
}

// Timing says how long an agent's rights last, and how long it waits.
type Timing struct {
	LeaseTTL   time.Duration // whole seconds; etcd raises it to its own floor
	Permit     time.Duration // for how long the kernel keeps answering when nobody renews; the same on all nodes
	ClaimDelay time.Duration // how much longer each next candidate of an IP waits
	Linger     time.Duration // for how long a former owner relays after a planned move

	// RestartGrace is for how long the kernel serves on without an agent that was told to stop; at least LeaseTTL.
	RestartGrace time.Duration

	Rebalance time.Duration // for how long an IP belongs elsewhere before it is moved there; 0: it stays
}

// Network says how the node's kernel is programmed.
type Network struct {
	Uplink string // link that all egress IPs leave by; "": the one whose subnet holds the IP, else that of NodeIP

	// HoldUnknown is for how long a pod of which the agent does not know yet whether it is selected waits with its
	// first connection to the outside; 0: not at all. It has the precision of a millisecond.
	HoldUnknown time.Duration

	RandomPorts bool   // choose the source ports of SNATed connections at random
	FastPath    bool   // forward by eBPF programs what the tables would (package fastpath)
	ShareTables bool   // let other programs write to the nftables tables, where the kernel can keep them off
	Sysctl      string // where the settings of /proc/sys/net can be written; empty: there

	Except  []netip.Prefix // destinations that are never SNATed, on top of nodes and pod CIDRs
	Cluster []netip.Prefix // ranges of pods and Services, which are not SNATed either
}

// Gossip says how the agents find out which of them are dead.
type Gossip struct {
	// what it is encrypted with; nil: no gossip, and whoever dies is found dead when its lease ends
	Key    []byte
	Keys   func() ([][]byte, error) // as gossip.Config's
	Port   int                      // its TCP and UDP port
	Freeze bool                     // keep the IPs while all agents have lost etcd
}

// agent is a running agent.
type agent struct {
	Config
	observers
	driver
	*kernel
	view    *store.View
	history *history
	metrics *metrics
	dirty   chan struct{} // capacity 1: reconcile
	loopState
}

// observers find out what no event of etcd or of the kernel tells.
type observers struct {
	probes *probes
	drops  *drops
	ports  *ports
	open   *openConnections
	natLog *natLogger // nil: off
}

// ReadyCheck is the name of the agent's check of /readyz: whoever waits before Run says so under it.
const ReadyCheck = "agent"

// Run is the agent of a node: it works in the network namespace of the calling thread until ctx ends, and then leaves
// kernel and lease as they are, the locks under a lease of RestartGrace and the permits extended to its end, so that
// the next agent of the node carries on without a lost packet. An error means that the agent cannot work at all: a
// kernel without what it needs, a second agent on the node.
func Run(ctx context.Context, cfg Config) error {
	lock, err := lockNode(cfg.Log)
	if err != nil {
		return err
	}
	if lock != nil {
		defer lock.Close()
	}
	// A kernel without part of it would be programmed in part, and pods would leave with other sources.
	if err := errors.Join(routing.Check(), nft.Check(), conntrack.Check()); err != nil {
		return fmt.Errorf("checking the kernel, which `egret check` says more of: %w", err)
	}
	a, err := open(cfg)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the agent needs CAP_NET_ADMIN and CAP_NET_RAW", err)
	}
	if err != nil {
		return err
	}
	defer a.tables.Close()
	defer a.fast.Close()
	if err := inject.Delete(); err != nil {
		a.Log.Warn("filters of tc that a former agent left may stay", "err", err) // they match no packet
	}
	if cfg.Monitor != nil {
		cfg.Monitor.Ready(ReadyCheck, a.record.ready.check)
		who := &answerer{node: cfg.Node, snapshot: a.view.Snapshot, log: a.natLog, kernel: a.readKernelOf, live: a.follow,
			list: func(m egress.Mark) ([]conntrack.Flow, error) { return conntrack.Flows(m, ^egress.Mark(0)) }}
		cfg.Monitor.Page(ConnectionsPage, http.HandlerFunc(who.connections))
		cfg.Monitor.Page(LogPage, http.HandlerFunc(who.natLog))
		cfg.Monitor.Trace(KernelPage, http.HandlerFunc(who.kernelPage))
		cfg.Monitor.Page(LivePage, http.HandlerFunc(who.livePage))
		cfg.Monitor.Share(TrafficPage, &trafficAnswerer{node: cfg.Node, now: sinceBoot, read: func() (map[netip.Addr]nft.Traffic, error) {
			return traffic(a.tables, a.fast)
		}})
	}
	if err := a.start(ctx); err != nil {
		return err
	}
	// These go on until the locks are kept for the next agent: the permits must not end meanwhile, nor the peers think
	// that the agent is dead.
	var untilStopped errgroup.Group
	after, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		stop()
		_ = untilStopped.Wait() // they end without error
	}()
	untilStopped.Go(func() error { return a.permits.run(after, a.Log) })
	if a.machine.Bounded() {
		untilStopped.Go(func() error { return a.confirm(after) })
	}
	if a.gossip != nil {
		untilStopped.Go(func() error { return a.gossip.Run(after) })
		untilStopped.Go(func() error { return a.askPromises(after) })
	}
	run, end := context.WithCancel(ctx)
	defer end()
	g, gctx := errgroup.WithContext(run)
	// The lease is renewed until the last of these has ended, whatever that waits for: its locks are moved then.
	renewing, stopRenewing := context.WithCancel(after)
	var renewals errgroup.Group
	renewals.Go(func() error { defer end(); return a.keepLease(renewing) })
	g.Go(func() error { return a.view.Run(gctx) })
	g.Go(func() error { return a.announcer.Run(gctx) })
	g.Go(func() error { return a.probes.run(gctx) })
	g.Go(func() error { return a.drops.run(gctx) })
	g.Go(func() error { return a.ports.run(gctx) })
	g.Go(func() error { return a.natLog.run(gctx) })
	if cfg.Monitor != nil && lock != nil {
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
		// They may open sockets: in the namespace of the thread that they happen to run on, as every thread of the
		// agent is in it.
		g.Go(func() error { return run(gctx, a.wake) })
	}
	watch(a.kernel.tables.Watch)
	watch(a.kernel.read.watcher.Watch)
	if a.fast != nil {
		watch(a.fast.Watch)
	}
	g.Go(func() (err error) {
		if a.record.features, err = a.look(); err != nil {
			return err
		}
		return a.loop(gctx)
	})
	err = g.Wait()
	stopRenewing()
	err = errors.Join(err, renewals.Wait())
	a.shutDown(ctx) // also after an error: the kernel serves on while the agent is started again
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// lockNode keeps a second agent off the node: an abstract unix socket lives and dies with the process, and is private
// to the network namespace. To take its name while no agent runs needs no right: who does keeps none from starting, but
// the agent has no socket then (nil).
func lockNode(log *slog.Logger) (net.Listener, error) {
	l, err := net.Listen("unix", Socket)
	if err == nil || !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	var who *unix.Ucred
	var unknown error
	for range 20 { // an agent listens as soon as it has the name
		if who, unknown = holder(); unknown == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if unknown == nil && who.Uid == 0 {
		return nil, fmt.Errorf("another egret agent runs in this network namespace, as process %d: %w", who.Pid, err)
	}
	if unknown == nil {
		err = fmt.Errorf("%w: by process %d of user %d", err, who.Pid, who.Uid)
	}
	log.Error("who is no agent has the agent's socket: root cannot ask the agent until that is stopped, and the agent started again", "err", errors.Join(err, unknown))
	return nil, nil
}

// holder returns the process that listens at the agent's socket.
func holder() (*unix.Ucred, error) {
	c, err := net.DialTimeout("unix", Socket, time.Second)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return monitor.Peer(c)
}

// open returns an agent that has nothing to itself yet: no lease, and nothing in the kernel but what its former one
// left.
func open(cfg Config) (a *agent, err error) {
	a = &agent{
		Config:    cfg,
		driver:    newDriver(cfg),
		view:      cfg.Store.NewView(cfg.Node),
		history:   newHistory(),
		metrics:   newMetrics(),
		dirty:     make(chan struct{}, 1),
		loopState: loopState{moves: newMoves(cfg)},
	}
	if cfg.Gossip.Key != nil {
		a.gossip = gossip.New(gossip.Config{
			Node: cfg.Node, Port: cfg.Gossip.Port, Key: cfg.Gossip.Key, Keys: cfg.Gossip.Keys, Log: cfg.Log, Changed: a.wake, Receive: a.receive,
		})
	}
	if a.kernel, err = openKernel(cfg, a.machine, a.metrics, a.wake); err != nil {
		return nil, err
	}
	if a.observers, err = a.observe(); err != nil {
		return nil, err
	}
	if cfg.Metrics != nil {
		if err := a.metrics.register(cfg.Metrics, monitor.NewReading(read(), a.readMetrics)); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return a, nil
}

// observe returns the observers; none runs yet.
func (a *agent) observe() (o observers, err error) {
	o.ports = newPorts(&ports{log: a.Log, opened: a.tables.Opened, list: conntrack.Flows, wake: a.wake, reuses: conntrack.ReusesPorts()})
	o.open = &openConnections{log: a.Log, count: func() (map[egress.ID]int, error) { return conntrack.CountByID(openHere) }}
	o.drops = &drops{log: a.Log, look: a.tables.Guarded, wake: a.wake, causes: a.causes}
	o.probes = newProbes(&probes{log: a.Log, unused: a.Store.Unused, wake: a.wake,
		there: func(link string) bool { _, err := net.InterfaceByName(link); return err == nil },
		probe: func(ctx context.Context, want map[netip.Addr]string) (map[netip.Addr]announce.Conflict, error) {
			return announce.Probe(ctx, want, announce.ProbeGap)
		}})
	o.natLog, err = newNATLogger(natLogConfig{
		cfg: a.NATLog, node: a.Node, version: a.Version, log: a.Log, snapshot: a.view.Snapshot, metrics: a.metrics,
		listen: func() (*conntrack.Events, error) { return conntrack.Listen(egress.ConnTag, egress.ConnTagMask) },
		list:   func() ([]conntrack.Flow, error) { return conntrack.Flows(egress.ConnTag, egress.ConnTagMask) },
	})
	return o, err
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
