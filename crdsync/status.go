package crdsync

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	egressKind = "egress"
	poolKind   = "pool"

	// A status that the API server refuses, mostly because the object changed meanwhile, is tried again soon, then less and less often.
	minStatusBackoff = 50 * time.Millisecond
	maxStatusBackoff = 30 * time.Second
	statusTimeout    = 10 * time.Second
	statusWorkers    = 4 // one slow answer does not hold up all others
)

// item names an object whose status is to be looked at.
type item struct{ kind, name string }

// status writes the status of the objects. What it writes follows from what publish was given last, and from etcd.
type status struct {
	dynamic dynamic.Interface
	source  *source
	cache   *store.Cache
	log     *slog.Logger

	mu       sync.Mutex                                 // guards what follows
	queue    workqueue.TypedRateLimitingInterface[item] // nil before begin, shut down after run
	verdicts map[string]verdict
	usage    map[string]v1beta1.IPPoolUsage
	scene    scene
}

func newStatus(d dynamic.Interface, c *store.Cache, log *slog.Logger) *status {
	return &status{dynamic: d, cache: c, log: log}
}

// begin makes the status ready to be looked at: a leadership begins.
func (s *status) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[item](minStatusBackoff, maxStatusBackoff))
	s.verdicts, s.usage, s.scene = nil, nil, scene{}
}

// run writes statuses from begin until ctx ends.
func (s *status) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.queue.ShutDown)()
	var wg sync.WaitGroup
	for range statusWorkers {
		wg.Go(func() {
			for {
				it, stop := s.queue.Get()
				if stop {
					return
				}
				s.work(ctx, it)
			}
		})
	}
	wg.Wait()
	return ctx.Err()
}

// look makes the worker look at an object. It never blocks.
func (s *status) look(kind, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queue != nil {
		s.queue.Add(item{kind, name})
	}
}

// publish takes in what etcd was made to hold, and has all objects looked at whose status is another now.
func (s *status) publish(c control) {
	now := readScene(s.cache)
	now.pools, now.nodes = c.pools, c.nodes // the cache may be behind
	s.mu.Lock()
	s.verdicts, s.usage, s.scene = c.verdicts, c.usage, now
	s.mu.Unlock()
	for kind, informer := range map[string]cache.SharedIndexInformer{egressKind: s.source.egresses, poolKind: s.source.pools} {
		for _, o := range informer.GetIndexer().List() {
			u := o.(*unstructured.Unstructured)
			if _, differs := s.desired(kind, u); differs {
				s.look(kind, u.GetName())
			}
		}
	}
}

func (s *status) work(ctx context.Context, it item) {
	defer s.queue.Done(it)
	err := s.write(ctx, it)
	switch {
	case err == nil || apierrors.IsNotFound(err) || ctx.Err() != nil:
		s.queue.Forget(it)
		return
	case !apierrors.IsConflict(err): // a conflict is the cache being behind
		s.log.Warn("writing a status failed, will retry", it.kind, it.name, "err", err)
	}
	s.queue.AddRateLimited(it)
}

// write makes the status of an object what it has to be.
func (s *status) write(ctx context.Context, it item) error {
	resource, informer := v1beta1.EgressResource, s.source.egresses
	if it.kind == poolKind {
		resource, informer = v1beta1.PoolResource, s.source.pools
	}
	o, ok, err := informer.GetIndexer().GetByKey(it.name)
	if err != nil || !ok {
		return err
	}
	u := o.(*unstructured.Unstructured)
	want, differs := s.desired(it.kind, u)
	if !differs {
		return nil
	}
	return s.update(ctx, resource, u, want)
}

func (s *status) update(ctx context.Context, resource schema.GroupVersionResource, u *unstructured.Unstructured, want any) error {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return fmt.Errorf("converting a status: %w", err)
	}
	u = u.DeepCopy()
	u.Object["status"] = m
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	_, err = s.dynamic.Resource(resource).UpdateStatus(ctx, u, metav1.UpdateOptions{})
	return err
}

// desired returns what the status of an object has to be, and whether it is another. Before the object as it is now has been mirrored,
// it has to be as it is.
func (s *status) desired(kind string, u *unstructured.Unstructured) (want any, differs bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	raw, _, _ := unstructured.NestedMap(u.Object, "status") // what is not a map is to be replaced
	if kind == poolKind {
		usage, ok := s.usage[u.GetName()]
		var old v1beta1.ExternalIPPoolStatus
		err := runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &old)
		return &v1beta1.ExternalIPPoolStatus{Usage: usage}, ok && (err != nil || raw == nil || old.Usage != usage)
	}
	v, ok := s.verdicts[u.GetName()]
	if !ok || v.generation != u.GetGeneration() {
		return nil, false
	}
	var old v1beta1.EgressStatus
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &old); err != nil {
		old = v1beta1.EgressStatus{}
	}
	status := egressStatus(old, v, s.scene, time.Now())
	return &status, !equalStatus(old, status)
}

// readScene reads from the cache what agents and operators write. A record that cannot be read counts as none.
func readScene(c *store.Cache) scene {
	faults := map[string]error{} // their writers, and the agents, report them
	s := scene{
		owners:  map[netip.Addr]egress.Owner{},
		agents:  decodeAll[egress.Agent](c, store.AgentPrefix, faults),
		cordons: decodeAll[egress.Cordon](c, store.CordonPrefix, faults),
	}
	for _, o := range decodeAll[egress.Owner](c, store.OwnerPrefix, faults) {
		s.owners[o.IP] = o
	}
	return s
}
