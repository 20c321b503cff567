package crdsync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
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
	maxStatusBackoff = 5 * time.Second
	statusTimeout    = 10 * time.Second
	statusWorkers    = 4 // one slow answer does not hold up all others
	// finishTimeout is how long a write that is under way goes on after the leadership: it may have been taken, and is to be told then.
	finishTimeout = time.Second
)

// item names an object whose status is to be looked at.
type item struct{ kind, name string }

// status writes the status of the objects. What it writes follows from what publish was given last, and from etcd.
type status struct {
	dynamic dynamic.Interface
	source  *source
	cache   *store.Cache
	diary   *diary
	log     *slog.Logger

	mu       sync.Mutex                                            // guards what follows
	queues   map[string]workqueue.TypedRateLimitingInterface[item] // by kind; nil before begin, shut down after run
	verdicts map[string]verdict
	usage    map[string]v1beta1.IPPoolUsage
	scene    scene
}

// begin makes the status ready to be looked at: a leadership begins.
func (s *status) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queues = map[string]workqueue.TypedRateLimitingInterface[item]{}
	for _, kind := range []string{egressKind, poolKind} {
		s.queues[kind] = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[item](minStatusBackoff, maxStatusBackoff))
	}
	s.diary.begin()
	s.verdicts, s.usage, s.scene = nil, nil, scene{}
}

// run writes statuses from begin until ctx ends. Pools do not wait for egresses: there are few of them, and what they say is to be
// right soon, however many egresses come at once.
func (s *status) run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, queue := range s.queues {
		defer context.AfterFunc(ctx, queue.ShutDown)()
		for range statusWorkers {
			wg.Go(func() {
				for {
					it, stop := queue.Get()
					if stop {
						return
					}
					s.work(ctx, queue, it)
				}
			})
		}
	}
	wg.Wait()
	return ctx.Err()
}

// look makes the worker look at an object. It never blocks.
func (s *status) look(kind, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queues != nil {
		s.queues[kind].Add(item{kind, name})
	}
}

// publish takes in what etcd was made to hold, and has all objects looked at whose status is another now.
func (s *status) publish(c control) {
	now := readScene(s.cache)
	now.pools, now.nodes = c.pools, c.nodes // the cache may be behind
	s.mu.Lock()
	s.verdicts, s.usage, s.scene = c.verdicts, c.usage, now
	s.mu.Unlock()
	s.lookAll(poolKind, s.source.pools)
	s.lookAll(egressKind, s.source.egresses)
}

func (s *status) lookAll(kind string, informer cache.SharedIndexInformer) {
	for _, o := range informer.GetIndexer().List() {
		u := o.(*unstructured.Unstructured)
		if _, differs := s.desired(kind, u); differs {
			s.look(kind, u.GetName())
		}
	}
}

func (s *status) work(ctx context.Context, queue workqueue.TypedRateLimitingInterface[item], it item) {
	defer queue.Done(it)
	if ctx.Err() != nil {
		return
	}
	finish, cancel := context.WithTimeout(context.WithoutCancel(ctx), statusTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(finishTimeout, cancel) })()
	err := s.write(finish, it)
	switch {
	case err == nil || apierrors.IsNotFound(err) || ctx.Err() != nil: // it was deleted meanwhile
		queue.Forget(it)
		return
	case !apierrors.IsConflict(err): // a conflict is the cache being behind
		s.log.Warn("writing a status failed, will retry", it.kind, it.name, "err", err)
	}
	queue.AddRateLimited(it)
}

// write makes the status of an object what it has to be, and tells what changed.
func (s *status) write(ctx context.Context, it item) error {
	if it.kind == poolKind {
		if u, ok := stored(s.source.pools, it.name); ok {
			_, err := s.update(ctx, v1beta1.PoolResource, it.kind, u)
			return err
		}
		return nil
	}
	var err error
	if u, ok := stored(s.source.egresses, it.name); !ok {
		s.diary.forget(it.name)
	} else if s.diary.current(u) {
		var now *unstructured.Unstructured
		if now, err = s.update(ctx, v1beta1.EgressResource, it.kind, u); now != nil || err != nil {
			s.diary.wrote(u, now, err)
		}
	}
	return errors.Join(err, s.diary.tell(ctx, it.name))
}

// stored returns an object of an informer.
func stored(informer cache.SharedIndexInformer, name string) (u *unstructured.Unstructured, ok bool) {
	o, ok, _ := informer.GetIndexer().GetByKey(name) // it never fails
	u, _ = o.(*unstructured.Unstructured)
	return u, ok
}

// update writes the status of an object where it has to be another, and returns the object as it is then; nil: it was not written.
func (s *status) update(ctx context.Context, r schema.GroupVersionResource, kind string, u *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	want, differs := s.desired(kind, u)
	if !differs {
		return nil, nil
	}
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return nil, fmt.Errorf("converting a status: %w", err)
	}
	u = u.DeepCopy()
	u.Object["status"] = m
	return s.dynamic.Resource(r).UpdateStatus(ctx, u, metav1.UpdateOptions{})
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
	s.faulty = map[string][]string{}
	for _, node := range slices.Sorted(maps.Keys(s.agents)) {
		if len(s.agents[node].Faults) == 0 {
			continue
		}
		prefix := store.MembersByNodeKey(node, "")
		for key := range c.List(prefix) {
			name := strings.TrimPrefix(key, prefix)
			s.faulty[name] = append(s.faulty[name], node)
		}
	}
	return s
}
