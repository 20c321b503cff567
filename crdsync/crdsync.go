package crdsync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/store"
)

// resignTimeout bounds the last words to etcd when the process is told to stop; without them, another replica waits for the TTL.
const resignTimeout = 2 * time.Second

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
	Log                 *slog.Logger
}

// prefixes are what crdsync reads of etcd: what it writes, and what the status tells of.
var prefixes = []string{
	store.PoolPrefix, store.EgressPrefix, store.AllocationPrefix, store.IDPrefix, store.NodePrefix, store.MembersByNode,
	store.MembersByEgress, counterKey, store.OwnerPrefix, store.AgentPrefix, store.CordonPrefix,
}

// Run mirrors the Kubernetes API into etcd whenever it is elected, until ctx ends, and then returns nil. All replicas follow both
// sides all the time, so that a new leader begins at once; one that cannot read both does not stand for election. Neither side being
// down ends it.
func Run(ctx context.Context, cfg Config) error {
	kube := rest.CopyConfig(cfg.Kube)
	kube.Timeout = 0 // it would end every watch; what is not a watch has a deadline of its own
	if kube.QPS == 0 {
		kube.QPS, kube.Burst = 50, 100 // client-go's 5 a second takes minutes for the status of a few hundred egresses
	}
	dyn, err := dynamic.NewForConfig(kube)
	if err != nil {
		return fmt.Errorf("making a client of the Kubernetes API: %w", err)
	}
	d := newDirty()
	cache := cfg.Store.NewCache(prefixes...)
	st := newStatus(dyn, cache, cfg.Log)
	src, err := newSource(kube, dyn, cfg.NodeCapacityDefault, d, st.look)
	if err != nil {
		return err
	}
	st.source = src
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return cache.Run(ctx) })
	g.Go(func() error { src.run(ctx); return nil })
	g.Go(func() error { return stand(ctx, cfg, src, cache, d, st) })
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// stand stands for election and leads, again and again, until ctx ends.
func stand(ctx context.Context, cfg Config, src *source, cache *store.Cache, d *dirty, st *status) error {
	cfg.Log.Info("reading the Kubernetes API and etcd")
	if !src.synced(ctx) {
		return ctx.Err()
	}
	select {
	case <-cache.Ready():
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		lead, err := cfg.Store.Campaign(ctx, cfg.ID, cfg.ElectionTTL)
		if err != nil {
			return err
		}
		cfg.Log.Info("leading")
		st.begin()
		m := &mirror{source: src, cache: cache, lead: lead, dirty: d, publish: st.publish, log: cfg.Log}
		g, leading := errgroup.WithContext(ctx)
		g.Go(func() error { return m.run(leading) })
		g.Go(func() error { return st.run(leading) })
		err = g.Wait()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
		_ = lead.Resign(end) // the lease ends by itself
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		cfg.Log.Warn("leadership is over, standing for election again", "err", err)
	}
}
