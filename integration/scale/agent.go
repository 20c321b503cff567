package scale

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/store"
)

// permit is the length of the agents' permits, the default of `egret agent`; leaseTTL and restartGrace are, too.
const (
	permit       = 500 * time.Millisecond
	leaseTTL     = 10 * time.Second
	restartGrace = 40 * time.Second
)

// simulated is the agent of one node of the fleet.
type simulated struct {
	fleet  *fleet
	number int
	record egress.Agent
	scope  store.Scope // the egresses whose IPs it holds, or the owners that its pods need
	holds  []netip.Addr

	store   *store.Client
	lease   *store.Lease
	running errgroup.Group
	life    context.Context // of what runs, until stop
	stop    context.CancelFunc
}

func newSimulated(f *fleet, number int) *simulated {
	node, ip := lab.NodeName(number), f.cfg.Cluster.nodeIP(number)
	return &simulated{fleet: f, number: number, record: egress.Agent{
		Node: node, Address: ip, MAC: egress.OverlayMAC(ip).String(), Version: "scale", Since: time.Now().UTC().Truncate(time.Second),
		Features: []string{"linux-6.8.0", "amd64", "nft-fwd", "vlan", "arp-answers", "owner-persist"}, Exposed: "the lab's etcd is plain",
		Ready: true, Permit: egress.Duration(permit), Promises: true, Revocable: true, Suspectable: true,
	}}
}

func (a *simulated) gateway() bool { return a.number <= a.fleet.cfg.Cluster.Gateways }

// join connects with etcd, takes a lease, and writes the record.
func (a *simulated) join(ctx context.Context) (err error) {
	if err := a.dial(ctx); err != nil {
		return err
	}
	if a.lease, err = a.store.Grant(ctx, leaseTTL); err != nil {
		return err
	}
	a.renew()
	return a.store.PutAgent(ctx, a.lease, a.record, 0)
}

func (a *simulated) dial(ctx context.Context) (err error) {
	a.store, err = store.Dial(ctx, store.Config{Endpoints: a.fleet.cfg.Endpoints, DialTimeout: time.Minute})
	return err
}

// renew keeps the lease, as agents do, and asks for a yes as often as those that hold IPs do.
func (a *simulated) renew() {
	a.life, a.stop = context.WithCancel(a.fleet.ctx)
	ctx, lease := a.life, a.lease
	a.running.Go(func() error {
		if err := lease.Run(ctx, store.Keep{Idle: func() bool { return !a.gateway() }}); ctx.Err() == nil && errors.Is(err, store.ErrLeaseLost) {
			a.fleet.lost.Add(1) // an agent would take another one: here the measurement is void
		}
		return nil
	})
	if !a.gateway() {
		return // who holds nothing asks nothing
	}
	a.running.Go(func() error {
		for sleep(ctx, permit/5) {
			try, cancel := context.WithTimeout(ctx, permit)
			if _, err := lease.Confirm(try, a.record.Node); err != nil && ctx.Err() == nil {
				a.fleet.unanswered.Add(1)
			}
			cancel()
		}
		return nil
	})
}

// claim takes the locks of an egress.
func (a *simulated) claim(ctx context.Context, p egress.Policy) error {
	for _, ip := range p.Addresses {
		o := egress.Owner{IP: ip.IP, Node: a.record.Node, Since: time.Now().UTC().Truncate(time.Millisecond), Why: egress.ReasonClaim}
		if ok, err := a.store.Claim(ctx, a.lease, o, store.Former{}); err != nil {
			return err
		} else if !ok {
			return fmt.Errorf("%s is another node's already", ip.IP)
		}
		a.holds = append(a.holds, ip.IP)
	}
	a.scope.Egresses = append(a.scope.Egresses, p.Name)
	return nil
}

// progressEvery is how often an agent of the fleet asks etcd how far it is, at most. Agents ask after each event: in a
// burst more often.
const progressEvery = 50 * time.Millisecond

// watch watches what the agent of such a node does, from a revision on, by one stream as a Cache does, and asks etcd
// how far it is after events. It returns when all watches are there.
func (a *simulated) watch(revision int64) error {
	ctx := clientv3.WithRequireLeader(a.life)
	stream, err := pb.NewWatchClient(a.store.Etcd().ActiveConnection()).Watch(ctx)
	if err != nil {
		return fmt.Errorf("watching: %w", err)
	}
	ranges := store.ViewRanges(a.record.Node, a.scope)
	created, ask := make(chan error, 2), make(chan struct{}, 1)
	a.running.Go(func() error { created <- a.receive(stream, len(ranges), created, ask); return nil })
	for _, r := range ranges {
		key := a.store.Prefix() + r
		create := &pb.WatchCreateRequest{Key: []byte(key), StartRevision: revision + 1}
		if strings.HasSuffix(key, "/") { // else it is one key
			create.RangeEnd = []byte(clientv3.GetPrefixRangeEnd(key))
		}
		if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
			return fmt.Errorf("watching %s: %w", key, err)
		}
	}
	if err := <-created; err != nil {
		return fmt.Errorf("watching: %w", err)
	}
	a.running.Go(func() error {
		for sleep(ctx, progressEvery) {
			select {
			case <-ctx.Done():
				return nil
			case <-ask:
				_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
			}
		}
		return nil
	})
	return nil
}

// receive counts what comes until the stream ends, and says when so many watches are there.
func (a *simulated) receive(stream pb.Watch_WatchClient, watches int, created chan<- error, ask chan<- struct{}) error {
	for {
		resp, err := stream.Recv()
		if err != nil {
			if a.life.Err() == nil {
				a.fleet.broken.Add(1)
			}
			return err
		}
		if resp.Canceled {
			a.fleet.broken.Add(1)
		}
		if resp.Created {
			if watches--; watches == 0 {
				created <- nil
			}
		}
		if len(resp.Events) > 0 {
			a.fleet.events.Add(int64(len(resp.Events)))
			select {
			case ask <- struct{}{}:
			default:
			}
		}
	}
}

// list reads what the view of an agent that starts reads, and returns at what revision.
func (a *simulated) list(ctx context.Context) (revision int64, err error) {
	size := 0
	all := store.Scope{Egresses: a.scope.Egresses} // an agent that begins reads the owners of all egress IPs
	for ranges := range slices.Chunk(store.ViewRanges(a.record.Node, all), 100) {
		var ops []clientv3.Op
		for _, r := range ranges {
			ops = append(ops, clientv3.OpGet(a.store.Prefix()+r, clientv3.WithPrefix(), clientv3.WithRev(revision)))
		}
		resp, err := a.store.Etcd().Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return 0, fmt.Errorf("listing: %w", err)
		}
		if revision == 0 {
			revision = resp.Header.Revision
		}
		for _, r := range resp.Responses {
			for _, kv := range r.GetResponseRange().Kvs {
				size += len(kv.Key) + len(kv.Value)
			}
		}
	}
	a.fleet.listed.Store(int64(size))
	return revision, nil
}

// restart does what an agent does that is told to stop, and then what its successor does.
func (a *simulated) restart(ctx context.Context) error {
	last, err := a.store.Agent(ctx, a.record.Node)
	if err != nil {
		return err
	}
	next, err := a.store.Grant(ctx, restartGrace)
	if err != nil {
		return err
	}
	last.Restarting, last.Revocable, last.Suspectable = true, false, false
	keep := func(netip.Addr) bool { return true }
	if err := a.lease.MoveTo(ctx, next, last, keep, nil); err != nil {
		return err
	}
	a.end()
	if err := a.dial(ctx); err != nil {
		return err
	}
	former, err := a.store.Agent(ctx, a.record.Node)
	if err != nil {
		return err
	}
	adopted, err := a.store.Adopt(ctx, next.ID())
	if err != nil {
		return err
	}
	if a.lease, err = a.store.Grant(ctx, leaseTTL); err != nil {
		return err
	}
	if err := adopted.MoveTo(ctx, a.lease, former, keep, nil); err != nil {
		return err
	}
	a.renew()
	revision, err := a.list(ctx)
	if err != nil {
		return err
	}
	if err := a.watch(revision); err != nil {
		return err
	}
	return a.store.PutAgent(ctx, a.lease, a.record, revision)
}

// end ends all that the agent does, and leaves its lease.
func (a *simulated) end() {
	a.stop()
	_ = a.store.Close()  // it says no more than that it was closed
	_ = a.running.Wait() // they end with the connection
	a.running = errgroup.Group{}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// counters are what the fleet counts.
type counters struct {
	events     atomic.Int64 // of watches
	broken     atomic.Int64 // watches
	unanswered atomic.Int64 // questions
	lost       atomic.Int64 // leases
	failed     atomic.Int64 // restarts
	listed     atomic.Int64 // bytes of the last list
}
