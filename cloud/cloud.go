package cloud

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/store"
)

// API is the cloud. Its methods are safe for concurrent use, and ask once: trying again is the controller's. After an
// error that is neither ErrRefused nor ErrThrottled, what was asked for may have been done, or may be done later.
type API interface {
	// Holders returns the network interfaces that have the addresses; of those that nobody has there is none. It may
	// take many answers, and bounds the time of each itself: ctx ends it when nobody wants to know any more.
	Holders(ctx context.Context, addresses []netip.Addr) (map[netip.Addr]string, error)
	// Assign gives the addresses, of one family, to the interface: all of them, or none. With move whoever has one
	// loses it in the same moment, which is asked of IPv4 addresses alone; without, it is refused where anybody else
	// has one.
	Assign(ctx context.Context, iface string, addresses []netip.Addr, move bool) error
	// Unassign takes the addresses, of one family, from the interface, which may not have them any more.
	Unassign(ctx context.Context, iface string, addresses []netip.Addr) error
}

var (
	// ErrRefused says that the cloud does not do what it was asked for, and has not. Asking again helps when
	// something else has changed.
	ErrRefused = errors.New("refused by the cloud")
	// ErrAddressRefused is ErrRefused for what one of the addresses is, or for their number: asking for fewer may help.
	ErrAddressRefused = fmt.Errorf("%w for an address", ErrRefused)
	// ErrNotSent says that the context's time was over before the cloud was asked: nothing was done.
	ErrNotSent = errors.New("too late to ask")
	// ErrThrottled says that the cloud was asked too often, and has done nothing.
	ErrThrottled = errors.New("asked too often")
)

// DefaultCheckInterval is how often it is read who has the addresses, unless Config says otherwise: a change by
// others is mended within.
const DefaultCheckInterval = 5 * time.Minute

// resignTimeout bounds the last words to etcd when the process is told to stop; without them, another replica waits
// for the TTL.
const resignTimeout = 2 * time.Second

// Config says what to follow, and which cloud to tell.
type Config struct {
	Store *store.Client
	Cloud API
	// ID names this replica in the election, for the operator's eyes.
	ID string
	// ElectionTTL is how long a leader that is not heard of stays leader; whole seconds.
	ElectionTTL time.Duration
	// CheckInterval is how often it is read who has the addresses; 0: DefaultCheckInterval.
	CheckInterval time.Duration
	Log           *slog.Logger
	// Monitor is where checks of health are registered, and Metrics where what is counted is; nil: nowhere. Both are
	// the caller's to serve.
	Monitor *monitor.Server
	Metrics prometheus.Registerer

	pace pace // for tests; the zero value: usual
}

// pace is how fast things go.
type pace struct {
	doubts         []time.Duration // after a read in doubt, when to read again, one after the other
	first, most    time.Duration   // the wait after a call of unknown outcome, or a throttled one, and the longest
	refused, never time.Duration   // the wait after a refusal, and the longest
	call           time.Duration   // how long the answer to a call is waited for
}

// usual: a request that is done late is, as far as can be known, done within seconds. EC2's buckets for these actions
// refill at some requests a second (docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html): 200 ms is a
// first try, 30 s leaves a whole account's other callers in peace.
var usual = pace{
	doubts: []time.Duration{time.Second, 5 * time.Second, 30 * time.Second},
	first:  200 * time.Millisecond, most: 30 * time.Second,
	refused: 5 * time.Second, never: 5 * time.Minute, call: 10 * time.Second,
}

// prefixes are what is read of etcd.
var prefixes = []string{
	store.OwnerPrefix, store.NodePrefix, store.PoolPrefix, store.AllocationPrefix, store.CloudPrefix,
}

// ReadyCheck is the name of the controller's check of /readyz: whoever waits before Run says so under it.
const ReadyCheck = "cloud"

// Run assigns whenever it is elected, until ctx ends, and then returns nil. Neither etcd nor the cloud being down
// ends it.
func Run(ctx context.Context, cfg Config) error {
	cfg.CheckInterval = cmp.Or(cfg.CheckInterval, DefaultCheckInterval)
	if cfg.pace.call == 0 {
		cfg.pace = usual
	}
	r := &replica{Config: cfg, cache: cfg.Store.NewCache(prefixes...), metrics: newMetrics()}
	if cfg.Metrics != nil {
		if err := r.metrics.register(cfg.Metrics); err != nil {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	if cfg.Monitor != nil {
		cfg.Monitor.Ready(ReadyCheck, r.check)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.cache.Run(ctx) })
	g.Go(func() error { return r.stand(ctx) })
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// replica is what one leadership after another has in common.
type replica struct {
	Config
	cache   *store.Cache
	metrics *metrics
	reached atomic.Bool // the cloud, once
}

// check reports whether the replica has read etcd and the cloud since it began: then it can take over.
func (r *replica) check() error {
	select {
	case <-r.cache.Ready():
	default:
		return errors.New("etcd has not been read yet")
	}
	if !r.reached.Load() {
		return errors.New("the cloud has not answered yet: see the log")
	}
	return nil
}

// stand stands for election and leads, again and again, until ctx ends. Who cannot read the cloud does not stand.
func (r *replica) stand(ctx context.Context) error {
	select {
	case <-r.cache.Ready():
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		if err := r.reach(ctx); err != nil {
			return err
		}
		lead, err := r.Store.Campaign(ctx, store.CloudElection, r.ID, r.ElectionTTL)
		if err != nil {
			return err
		}
		r.Log.Info("leading")
		r.metrics.leads(true)
		err = newController(r, lead).run(ctx)
		r.metrics.leads(false)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
		_ = lead.Resign(end) // the lease ends by itself
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.Log.Warn("leadership is over, standing for election again", "err", err)
	}
}

// reach waits until the cloud answers.
func (r *replica) reach(ctx context.Context) error {
	for said, wait := false, r.pace.first; ; wait = min(2*wait, r.pace.most) {
		err := r.ask(ctx)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if !said {
			said = true
			r.Log.Error("the cloud cannot be read, not standing for election; will retry", "err", err)
		}
		select {
		case <-time.After(jitter(wait)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask reads something of the cloud: who has one of the addresses that there are.
func (r *replica) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.pace.call)
	defer cancel()
	all := sorted(readState(r.cache, nil).toRead())
	if len(all) == 0 {
		// Nobody's (RFC 5737): it is asked whether the cloud answers.
		all = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	}
	_, err := r.Cloud.Holders(ctx, all[:1])
	r.metrics.called("read", err)
	if err == nil {
		r.reached.Store(true)
	}
	return err
}
