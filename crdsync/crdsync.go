package crdsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/dynamic"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	eventsclient "k8s.io/client-go/kubernetes/typed/events/v1"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/crdsync/admission"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/store"
)

// resignTimeout bounds the resignation when the process stops; without it, another replica waits for the TTL.
const resignTimeout = 2 * time.Second

const (
	// readTimeout is how long a new leader may take to read all objects: seconds for tens of thousands of pods. Another
	// one may try then.
	readTimeout = time.Minute
)

// Config says what to mirror, and where to.
type Config struct {
	Kube  *rest.Config
	Store *store.Client
	// ID names this replica in the election, for the operator's eyes.
	ID string
	// ElectionTTL is how long a leader that is not heard of stays leader; whole seconds.
	ElectionTTL time.Duration
	// NodeCapacityDefault is how many egress IPs a node without the annotation may hold; 0: no limit of its own.
	NodeCapacityDefault int
	// FollowCordon treats a node that is cordoned in Kubernetes, or shutting down, as cordoned.
	FollowCordon bool
	// StartupTaint is the key of a taint that is taken off nodes whose agent is ready; empty: none.
	StartupTaint string
	// CompactAfter is for how long etcd keeps old revisions; 0: somebody else compacts. Defragment defragments etcd's
	// members, which gives unused space back. HousekeepingInterval is how often both are checked; 0: every 10 s.
	CompactAfter         time.Duration
	Defragment           bool
	HousekeepingInterval time.Duration
	// ClusterCIDRs are ranges of pods, of nodes that have no podCIDRs: of pods in them, nothing needs to be written.
	ClusterCIDRs []netip.Prefix
	// BlockSize is how many ports the first block of a node has (egress.Block): a power of two from egress.MinBlock to
	// egress.MaxBlock; 0: no node has any, and what nodes have is taken away. BlockRest is how long a freed block
	// rests; 0: 2 min.
	BlockSize int
	BlockRest time.Duration
	// BlockHistory is for how long etcd keeps who had a block; 0: not at all.
	BlockHistory time.Duration
	// Webhook is nil where crdsync does not serve the webhook.
	Webhook *Webhook
	Log     *slog.Logger
	// Monitor is where checks of health are registered, and Metrics where what crdsync counts is; nil: nowhere. Both
	// are the caller's to serve.
	Monitor *monitor.Server
	Metrics prometheus.Registerer

	readPatience time.Duration // for tests; 0: the constant
}

// Validate returns all that is wrong with the Config.
func (c Config) Validate() error {
	var err error
	if n := c.BlockSize; n != 0 && (n < egress.MinBlock || n > egress.MaxBlock || bits.OnesCount(uint(n)) != 1) {
		err = fmt.Errorf("--block-size %d: want 0, or a power of two from %d to %d", n, egress.MinBlock, egress.MaxBlock)
	}
	if c.BlockHistory < 0 {
		err = errors.Join(err, fmt.Errorf("--block-history %v: want a duration, or 0", c.BlockHistory))
	}
	if c.Webhook != nil {
		err = errors.Join(err, c.Webhook.admission().Validate())
	}
	return errors.Join(err, validTaint(c.StartupTaint))
}

// Webhook says where the webhook is served. Package admission has more.
type Webhook struct {
	Address   string // to listen at, host:port
	Namespace string // of the Service, and of the Secret with the CA
	// ClientCA and Clients say who may ask, as in admission.Config.
	ClientCA string
	Clients  []string
}

func (w *Webhook) admission() admission.Config {
	return admission.Config{Address: w.Address, Namespace: w.Namespace, ClientCA: w.ClientCA, Clients: w.Clients}
}

// prefixes are what crdsync reads of etcd: what it writes, and what the status depends on.
var prefixes = []string{
	store.PoolPrefix, store.EgressPrefix, store.AllocationPrefix, store.IDPrefix, store.NodePrefix, store.ServicePrefix, store.PodPrefix,
	store.MembersByNode, store.MembersByEgress, store.BlockPrefix, store.CounterPrefix, store.OwnerPrefix, store.AgentPrefix, store.CordonPrefix,
}

// Run mirrors the Kubernetes API into etcd whenever it is elected, until ctx ends, and then returns nil. A replica that
// cannot read both sides does not stand for election. Neither side being down ends it.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	kube := rest.CopyConfig(cfg.Kube)
	kube.Timeout = 0 // it would end every watch; what is not a watch has a deadline of its own
	if kube.QPS == 0 {
		// client-go's 5 a second takes minutes for the status of a few hundred egresses, and their Events
		kube.QPS, kube.Burst = 200, 400
	}
	dyn, err := dynamic.NewForConfig(kube)
	if err != nil {
		return fmt.Errorf("making a client of the Kubernetes API: %w", err)
	}
	events, err := eventsclient.NewForConfig(kube)
	if err != nil {
		return fmt.Errorf("making a client of the Kubernetes API: %w", err)
	}
	r := &replica{Config: cfg, kube: kube, dynamic: dyn, events: events, cache: cfg.Store.NewCache(prefixes...), metrics: newMetrics()}
	r.cache.Track()
	if cfg.Metrics != nil {
		if err := r.metrics.register(cfg.Metrics, monitor.NewReading(read(), r.readMetrics)); err != nil {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	if cfg.Monitor != nil {
		cfg.Monitor.Ready(ReadyCheck, r.check)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.cache.Run(ctx) })
	g.Go(func() error { return r.stand(ctx) })
	g.Go(func() error { return r.rescue(ctx) })
	if w := cfg.Webhook; w != nil {
		g.Go(func() error {
			a := w.admission()
			a.Kube, a.InUse, a.Log = kube, r.inUse, cfg.Log
			a.Reviewed = func(verdict string) { r.metrics.add(metricReviews, 1, verdict) }
			a.Answers = func() { r.webhook.Store(true) }
			return admission.Run(ctx, a)
		})
	}
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// replica is one crdsync process, over all its leaderships.
type replica struct {
	Config
	kube    *rest.Config
	dynamic dynamic.Interface
	events  eventsclient.EventsGetter
	cache   *store.Cache
	metrics *metrics
	reached atomic.Bool // the Kubernetes API, once
	webhook atomic.Bool // it answers, once
}

// ReadyCheck is the name of crdsync's check of /readyz: whoever waits before Run says so under it.
const ReadyCheck = "crdsync"

// check reports whether the replica has read etcd and reached the Kubernetes API since it began, and the webhook, where
// it serves that, can answer: then it can take over.
func (r *replica) check() error {
	select {
	case <-r.cache.Ready():
	default:
		return errors.New("etcd has not been read yet")
	}
	if !r.reached.Load() {
		return errors.New("the Kubernetes API has not answered yet")
	}
	if r.Webhook != nil && !r.webhook.Load() {
		return errors.New("the webhook has no certificate or no port yet")
	}
	return nil
}

// inUse returns the addresses that etcd shows as allocated.
func (r *replica) inUse() ([]egress.Allocation, error) {
	select {
	case <-r.cache.Ready():
		return slices.Collect(maps.Values(readRecords(r.cache).allocations)), nil
	default:
		return nil, errors.New("etcd has not been read yet")
	}
}

// stand stands for election and leads, in a loop, until ctx ends.
func (r *replica) stand(ctx context.Context) error {
	r.Log.Info("reading the Kubernetes API and etcd")
	select {
	case <-r.cache.Ready():
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		if err := r.reach(ctx); err != nil {
			return err
		}
		r.reached.Store(true)
		lead, end, err := r.campaign(ctx)
		switch {
		case errors.Is(err, errUnread):
			continue
		case err != nil:
			return err
		}
		err = r.lead(ctx, lead)
		r.resign(ctx, lead)
		end()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.Log.Warn("leadership is over, standing for election again", "err", err)
	}
}

func (r *replica) resign(ctx context.Context, lead *store.Leadership) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
	defer cancel()
	_ = lead.Resign(ctx) // the lease ends by itself
}

// lead mirrors until the leadership is over. It reads the API anew: what a replica saw while it only stood by may be
// hours old, and by it, what others did meanwhile would be undone.
func (r *replica) lead(ctx context.Context, lead *store.Leadership) error {
	if err := r.ask(ctx); err != nil {
		return fmt.Errorf("%w: %w", errUnread, err)
	}
	d := newDirty()
	st := &status{dynamic: r.dynamic, cache: r.cache, recorder: &eventRecorder{client: r.events, instance: r.ID, store: r.Store, lead: lead, log: r.Log}, log: r.Log, counts: r.metrics}
	r.metrics.leads(st)
	defer r.metrics.leads(nil)
	src, err := newSource(ctx, r.kube, nodeDefaults{r.NodeCapacityDefault, r.FollowCordon, r.StartupTaint}, d, st.look)
	if err != nil {
		return err
	}
	st.source = src
	var untaint *startup
	if r.StartupTaint != "" {
		client, err := corev1client.NewForConfig(r.kube)
		if err != nil {
			return fmt.Errorf("making a client of the Kubernetes API: %w", err)
		}
		if untaint, err = newStartup(r.StartupTaint, src, r.Store.NewCache(store.AgentPrefix), client, r.Log); err != nil {
			return err
		}
	}
	if src.services == nil {
		r.Log.Warn("this API server shows no ServiceCIDRs (Kubernetes has them since 1.33): --cluster-cidrs of the agents has to name them")
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		// Whatever etcd and the API server answer or do not: nothing more is written after this.
		select {
		case <-lead.Lost():
			return store.ErrNotLeader
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	g.Go(func() error { src.run(ctx); return nil })
	g.Go(func() error { return r.partitioned(ctx, lead) })
	g.Go(func() error {
		read, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		if !src.synced(read) {
			return fmt.Errorf("the Kubernetes API could not be read within %v", readTimeout)
		}
		r.Log.Info("leading")
		if err := st.begin(read); err != nil {
			return err
		}
		g.Go(func() error { return st.run(ctx) })
		did := newActEvents(r.Store, st)
		g.Go(func() error { return did.cache.Run(ctx) })
		g.Go(func() error { return did.run(ctx) })
		if untaint != nil {
			g.Go(func() error { return untaint.agents.Run(ctx) })
			g.Go(func() error { return untaint.run(ctx) })
		}
		g.Go(func() error { return r.housekeeping(lead, st.createPoolEvents).run(ctx) })
		kept, err := r.newBlockHistory(ctx, lead)
		if err != nil {
			return err
		}
		g.Go(func() error { return kept.run(ctx) })
		ports := blocks{size: r.BlockSize, rest: cmp.Or(r.BlockRest, blockRest), metrics: r.metrics, history: kept}
		m := &mirror{source: src, cache: r.cache, lead: lead, dirty: d, publish: st.publish, clusterCIDRs: r.ClusterCIDRs, blocks: ports, log: r.Log, metrics: r.metrics}
		m.collect = func(c control) {
			g.Go(func() error {
				if err := collectGarbage(ctx, r.Store, lead, r.cache, c); err != nil && ctx.Err() == nil {
					r.Log.Warn("what is left of IPs and nodes that are gone was not removed; the next leader does it", "err", err)
				}
				return nil
			})
		}
		g.Go(func() error { return m.resync(ctx) })
		return m.run(ctx)
	})
	return g.Wait()
}
