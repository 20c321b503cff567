package scale

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/store"
)

// helperName is the command of the fleet: a process of its own, on the control host, so that its memory and its network
// are its own.
const helperName = "scale-fleet"

// Helper makes the calling program the fleet when args, os.Args, ask for that, and returns its exit status; ok is
// false, at once, in every other case. A program that calls Run calls it first thing in main, beside lab.Helper.
func Helper(args []string) (status int, ok bool) {
	if len(args) != 2 || args[1] != helperName {
		return 0, false
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := serveFleet(ctx, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "egret-lab:", helperName+":", err)
		return 1, true
	}
	return 0, true
}

// fleetConfig is the first line that the fleet reads.
type fleetConfig struct {
	Cluster   Cluster
	Endpoints []string // of Egret's etcd
	Kube      string   // the API server's etcd
	Key       string   // of the gossip, base64
}

// request is each further line; its answer is a line, too.
type request struct {
	Do       string // load, join, count, die, rollout
	Parallel int
	For      time.Duration
}

type reply struct {
	Err     string        `json:",omitempty"`
	Took    time.Duration // of what was asked for
	Done    int           // how many agents
	Events  int64         // of watches, since the start
	Broken  int64         // watches
	Unheard int64         // questions without an answer
	Lost    int64         // leases
	Failed  int64         // agents that could not be restarted
	Listed  int64         // bytes of the last list
	Steps   []string      // what took how long
}

// fleet is all agents but that of node 1.
type fleet struct {
	counters
	cfg    fleetConfig
	ctx    context.Context // of all that outlives a request
	agents []*simulated    // from node 2 on
	heard  *gossip.Gossip  // that of node 3
	steps  []string        // of join, and how long each took
}

// serveFleet does what is asked for by in until that ends.
func serveFleet(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	debug.SetGCPercent(200) // its memory is nobody's measure, its CPU takes from the others
	d, e := json.NewDecoder(in), json.NewEncoder(out)
	f := &fleet{ctx: ctx}
	if err := d.Decode(&f.cfg); err != nil {
		return fmt.Errorf("reading what the fleet is: %w", err)
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	// the runtime has raised the soft limit to the hard one
	if want := uint64(f.cfg.Cluster.Nodes) + 500; files.Max < want {
		return fmt.Errorf("%d open files are allowed, a connection for each agent takes %d: ulimit -Hn %d", files.Max, want, want)
	}
	if err := f.network(); err != nil {
		return err
	}
	for {
		var r request
		if err := d.Decode(&r); errors.Is(err, io.EOF) {
			return nil // the agents end with the process
		} else if err != nil {
			return fmt.Errorf("reading a request: %w", err)
		}
		began := time.Now()
		done, err := f.do(ctx, r)
		a := reply{Took: time.Since(began), Done: done, Events: f.events.Load(), Broken: f.broken.Load(), Unheard: f.unanswered.Load(),
			Listed: f.listed.Load(), Lost: f.lost.Load(), Failed: f.failed.Load(), Steps: f.steps}
		if err != nil {
			a.Err = err.Error()
		}
		if err := e.Encode(a); err != nil {
			return err
		}
	}
}

func (f *fleet) do(ctx context.Context, r request) (int, error) {
	switch r.Do {
	case "load":
		etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{f.cfg.Kube}, Logger: zap.NewNop()})
		if err != nil {
			return 0, err
		}
		defer etcd.Close()
		return f.cfg.Cluster.Pods, f.cfg.Cluster.Load(ctx, etcd)
	case "join":
		return len(f.agents), f.join(ctx)
	case "count":
		return len(f.agents), nil
	case "die":
		return 1, f.die(ctx)
	case "rollout":
		return f.rollout(ctx, r.Parallel, r.For)
	}
	return 0, fmt.Errorf("request %q: there is no such", r.Do)
}

// network gives the control host the addresses of the gateways.
func (f *fleet) network() error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("finding the control host's link: %w", err)
	}
	for n := 2; n <= f.cfg.Cluster.Gateways; n++ {
		ip := f.cfg.Cluster.nodeIP(n)
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: netlink.NewIPNet(ip.AsSlice())}); err != nil {
			return fmt.Errorf("giving the control host %s: %w", ip, err)
		}
	}
	return nil
}

// join lets all agents join: first all have their records, then the gateways their locks, then all watch. In that order
// a start is not told to everybody else, as it would be in a cluster that grows.
func (f *fleet) join(ctx context.Context) error {
	for n := 2; n <= f.cfg.Cluster.Nodes; n++ {
		f.agents = append(f.agents, newSimulated(f, n))
	}
	began := time.Now()
	step := func(what string) {
		f.steps = append(f.steps, fmt.Sprintf("%s %.1fs", what, time.Since(began).Seconds()))
		began = time.Now()
	}
	if err := f.each(f.agents, 16, func(a *simulated) error { return a.join(f.ctx) }); err != nil {
		return fmt.Errorf("joining: %w", err)
	}
	step("records")
	first := f.agents[0].store
	all, err := first.ReadAll(ctx)
	if err != nil {
		return err
	}
	gateways := f.agents[:f.cfg.Cluster.Gateways-1]
	shares := make([][]egress.Policy, len(gateways))
	i := 0
	for _, p := range all.Egresses {
		if isPair(p) {
			shares[0] = append(shares[0], p)
		} else {
			n := 1 + i%(len(gateways)-1)
			shares[n] = append(shares[n], p)
			i++
		}
	}
	if err := f.each(gateways, 8, func(a *simulated) error {
		for _, p := range shares[a.number-2] {
			if err := a.claim(ctx, p); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return fmt.Errorf("claiming: %w", err)
	}
	used := map[int][]netip.Addr{} // by the pods of a node
	for pod := range f.cfg.Cluster.Pods {
		n := f.cfg.Cluster.node(pod)
		for _, ip := range all.Egresses[f.cfg.Cluster.egress(pod, f.cfg.Cluster.app(pod))].Addresses {
			used[n] = append(used[n], ip.IP)
		}
	}
	for _, a := range f.agents {
		if !a.gateway() {
			slices.SortFunc(used[a.number], netip.Addr.Compare)
			a.scope = store.Scope{Narrow: true, Owners: slices.Compact(used[a.number])}
		}
	}
	step("locks")
	if err := f.gossip(gateways); err != nil {
		return err
	}
	now, err := first.Etcd().Get(ctx, first.Prefix(), clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	defer step("watches")
	return f.each(f.agents, 16, func(a *simulated) error { return a.watch(now.Header.Revision) })
}

// each does something for all agents, so many at a time.
func (f *fleet) each(agents []*simulated, parallel int, do func(*simulated) error) error {
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, a := range agents {
		g.Go(func() error {
			if err := do(a); err != nil {
				return fmt.Errorf("%s: %w", a.record.Node, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// gossip lets the gateways gossip with each other and with node 1.
func (f *fleet) gossip(gateways []*simulated) error {
	key, err := base64.StdEncoding.DecodeString(f.cfg.Key)
	if err != nil {
		return fmt.Errorf("reading the key of the gossip: %w", err)
	}
	for _, a := range gateways {
		peers := map[string]netip.Addr{lab.NodeName(1): lab.NodeIP(1)}
		for _, b := range gateways {
			if a != b {
				peers[b.record.Node] = b.record.Address
			}
		}
		g := gossip.New(gossip.Config{
			Node: a.record.Node, Port: gossip.DefaultPort, Key: key, Log: slog.New(slog.DiscardHandler), Changed: func() {},
		})
		if a.number == 3 {
			f.heard = g
		}
		g.Set(a.record.Address, peers, nil, 1)
		go func() { _ = g.Run(f.ctx) }() // it ends with the process
	}
	return nil
}

// die powers node 2 off: nothing of it is heard any more. The agent of node 3, as the first in rank would, suspects
// that of node 2 when the gossip holds it for dead, and revokes its lease when the suspicion has stood for six tenths
// of a permit.
func (f *fleet) die(ctx context.Context) error {
	victim, heir := f.agents[0], f.agents[1]
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := netlink.AddrDel(link, &netlink.Addr{IPNet: netlink.NewIPNet(victim.record.Address.AsSlice())}); err != nil {
		return fmt.Errorf("taking the address of %s away: %w", victim.record.Node, err)
	}
	victim.stop()
	for began := time.Now(); f.heard.State(victim.record.Node) != gossip.Dead; sleep(ctx, time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			return fmt.Errorf("the gossip does not hold %s for dead", victim.record.Node)
		}
	}
	s := egress.Suspicion{Node: victim.record.Node, Lease: egress.FormatLease(victim.lease.ID()), By: heir.record.Node, Since: time.Now().UTC()}
	now, err := heir.store.Etcd().Get(ctx, heir.store.Prefix(), clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	if _, err := heir.store.Suspect(ctx, s, now.Header.Revision); err != nil { // node 1 may have been faster
		return err
	}
	sleep(ctx, permit*6/10)
	if err := heir.store.Revoke(ctx, victim.lease.ID()); err != nil {
		return err
	}
	f.agents = slices.Delete(f.agents, 0, 1)
	return nil
}

// rollout restarts agents, so many at a time, until all are or the time is over, and returns how many were. One that
// cannot be goes on as it is, and is counted.
func (f *fleet) rollout(ctx context.Context, parallel int, most time.Duration) (int, error) {
	end := time.Now().Add(most)
	var done atomic.Int64
	err := f.each(f.agents, parallel, func(a *simulated) error {
		if time.Now().After(end) {
			return nil
		}
		try, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if err := a.restart(try); err != nil {
			fmt.Fprintf(os.Stderr, "%s was not restarted: %v\n", a.record.Node, err)
			f.failed.Add(1)
			return nil
		}
		done.Add(1)
		return nil
	})
	return int(done.Load()), err
}
