package crdsync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
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
	poolFault  = "InvalidPool" // the reason of the Event

	// A status that the API server refuses, mostly because the object changed meanwhile, is tried again soon, then less
	// and less often.
	minStatusBackoff = 50 * time.Millisecond
	maxStatusBackoff = 5 * time.Second
	statusTimeout    = 10 * time.Second
	statusWorkers    = 4 // one slow answer does not hold up all others
	// finishTimeout is how long a write that is under way goes on after the leadership: it may have been taken, and
	// then has its Events.
	finishTimeout = time.Second
)

// kinds are what the API calls them.
var kinds = map[string]string{egressKind: "Egress", poolKind: "ExternalIPPool"}

// item names an object whose status is to be looked at.
type item struct{ kind, name string }

// status writes the status of the objects. What it writes follows from what publish was given last, and from etcd.
type status struct {
	dynamic  dynamic.Interface
	source   *source
	cache    *store.Cache
	recorder *eventRecorder
	log      *slog.Logger
	counts   *metrics // nil: nobody asks

	wake chan struct{} // capacity 1: something was published

	mu        sync.Mutex // guards what follows
	published control
	queues    map[string]workqueue.TypedRateLimitingInterface[item] // by kind; nil before begin, shut down after run
	// written are the versions of objects of which the status was written: an informer that still shows one is behind.
	written  map[item]string
	decoded  map[string]decoded // by egress
	verdicts map[string]verdict // nil until publish was called
	usage    map[string]v1beta1.IPPoolUsage
	faults   map[string]error // as those of control
	pressed  map[string]string
	cluster  clusterState
}

// decoded is what an object of an informer says. Decoding it is most of what comparing it costs, and with thousands of
// egresses few are others than the last time.
type decoded struct {
	of     *unstructured.Unstructured
	status v1beta1.EgressStatus
}

// begin makes the status ready to be looked at: a leadership begins.
func (s *status) begin(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queues = map[string]workqueue.TypedRateLimitingInterface[item]{}
	for _, kind := range []string{egressKind, poolKind} {
		s.queues[kind] = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[item](minStatusBackoff, maxStatusBackoff))
	}
	s.written, s.decoded, s.wake = map[item]string{}, map[string]decoded{}, make(chan struct{}, 1)
	s.verdicts, s.usage, s.faults, s.pressed, s.cluster = nil, nil, nil, nil, clusterState{}
	return s.recorder.begin(ctx)
}

// run writes statuses from begin until ctx ends. Pools do not wait for egresses: there are few of them, and what they
// say is to be right soon, however many egresses come at once.
func (s *status) run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.compare(ctx) })
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

// look queues an object for the workers. It never blocks.
func (s *status) look(kind, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queues != nil {
		s.queues[kind].Add(item{kind, name})
	}
}

// publish takes in what etcd has now. It does not wait for anything: the pass that calls it has pods to write.
func (s *status) publish(c control) {
	s.mu.Lock()
	s.published = c
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// compare queues all objects whose status has to change, whenever something was published, until ctx ends. With
// thousands of egresses that takes a second of a processor, and in an outage something changes every few milliseconds:
// so it pauses for as long as it took.
func (s *status) compare(ctx context.Context) {
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		}
		began := time.Now()
		s.compareAll()
		select {
		case <-time.After(time.Since(began)):
		case <-ctx.Done():
			return
		}
	}
}

func (s *status) compareAll() {
	now := readClusterState(s.cache)
	s.mu.Lock()
	c := s.published
	now.Pools, now.Nodes = c.pools, map[string]egress.Node{} // the cache may be behind
	for _, n := range c.nodes {
		now.Nodes[n.Name] = n
	}
	first := s.verdicts == nil
	s.verdicts, s.usage, s.faults, s.pressed, s.cluster = c.verdicts, c.usage, c.faults, c.pressed, now
	s.mu.Unlock()
	s.lookAll(poolKind, s.source.pools, first)
	s.lookAll(egressKind, s.source.egresses, first)
	if first { // objects that have records and are gone have last Events
		for _, it := range s.recorder.items() {
			s.look(it.kind, it.name)
		}
	}
}

func (s *status) lookAll(kind string, informer cache.SharedIndexInformer, always bool) {
	for _, o := range informer.GetIndexer().List() {
		u := o.(*unstructured.Unstructured)
		if _, differs := s.desired(kind, u); always || differs || kind == poolKind && s.poolWarningsDiffer(u.GetName()) {
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
	later, err := s.write(finish, it)
	if err == nil {
		s.counts.add(metricStatus, 1, it.kind, "ok")
	} else if ctx.Err() == nil {
		s.counts.add(metricStatus, 1, it.kind, "failed")
	}
	switch {
	case err == nil || ctx.Err() != nil:
		queue.Forget(it)
		if later > 0 {
			queue.AddAfter(it, later)
		}
		return
	case apierrors.IsInvalid(err): // the object is older than the schema, and has an Event of that; a change of it is looked at at once
		queue.Forget(it)
		queue.AddAfter(it, resync)
		return
	case apierrors.IsNotFound(err): // it was deleted meanwhile: the informer will show that
		queue.Forget(it)
		return
	case !apierrors.IsConflict(err): // a conflict is the cache being behind
		s.log.Warn("writing a status failed, will retry", it.kind, it.name, "err", err)
	}
	queue.AddRateLimited(it)
}

// write makes the Events of what changed of an object, and its status what it has to be. later is when to look again,
// 0: when something changed.
func (s *status) write(ctx context.Context, it item) (later time.Duration, err error) {
	u, ok := stored(s.informer(it.kind), it.name)
	s.mu.Lock()
	if !ok {
		delete(s.written, it)
		if it.kind == egressKind {
			delete(s.decoded, it.name)
		}
		s.mu.Unlock()
		return 0, s.recorder.recordDeleted(ctx, it)
	}
	behind := s.written[it] == u.GetResourceVersion()
	s.mu.Unlock()
	if behind { // the informer will show the newer one
		return 0, nil
	}
	// A status whose writer died then, or got no answer, has its Events before the next one is written.
	if later, err = s.record(ctx, it, u); err != nil {
		return 0, err
	}
	now, err := s.update(ctx, it.kind, u)
	if apierrors.IsInvalid(err) {
		err = errors.Join(err, s.recorder.recordRefused(ctx, u, it, err))
	}
	if now == nil || err != nil {
		return later, err
	}
	s.mu.Lock()
	s.written[it] = u.GetResourceVersion()
	s.mu.Unlock()
	return s.record(ctx, it, now)
}

// record makes the Events that the status of an object, or the faults of a pool, have not had yet.
func (s *status) record(ctx context.Context, it item, u *unstructured.Unstructured) (later time.Duration, err error) {
	var now eventRecord
	var warnings map[string]eventText
	if it.kind == egressKind {
		now, warnings, later = eventRecordOf(readStatus(u), time.Now())
	} else {
		var known bool
		if warnings, known = s.poolWarnings(it.name); !known {
			return 0, nil
		}
		now.Warnings = slices.Sorted(maps.Keys(warnings))
	}
	return later, s.recorder.record(ctx, u, it, now, warnings)
}

// poolWarnings returns what is wrong with a pool, which has no conditions that could say so. known is false before the
// first pass.
func (s *status) poolWarnings(name string) (warnings map[string]eventText, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	warnings = map[string]eventText{}
	if err := s.faults["pool "+name]; err != nil {
		warnings[line(err)] = eventText{corev1.EventTypeWarning, poolFault, "Allocate", line(err)}
	}
	if said := s.pressed[name]; said != "" { // other IPs are no new warning
		warnings[v1beta1.ReasonPortsExhausted] = eventText{corev1.EventTypeWarning, v1beta1.ReasonPortsExhausted, "Allocate", said}
	}
	return warnings, s.verdicts != nil
}

// poolWarningsDiffer reports whether the warnings in a pool's record are not those that it has.
func (s *status) poolWarningsDiffer(name string) bool {
	now, known := s.poolWarnings(name)
	return known && !slices.Equal(slices.Sorted(maps.Keys(now)), s.recorder.warnings(item{poolKind, name}))
}

func (s *status) informer(kind string) cache.SharedIndexInformer {
	if kind == poolKind {
		return s.source.pools
	}
	return s.source.egresses
}

// stored returns an object of an informer.
func stored(informer cache.SharedIndexInformer, name string) (u *unstructured.Unstructured, ok bool) {
	o, ok, _ := informer.GetIndexer().GetByKey(name) // it never fails
	u, _ = o.(*unstructured.Unstructured)
	return u, ok
}

// update writes the status of an object where it has to be another, and returns the object as it is then; nil: it was
// not written.
func (s *status) update(ctx context.Context, kind string, u *unstructured.Unstructured) (*unstructured.Unstructured, error) {
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
	resource := v1beta1.EgressResource
	if kind == poolKind {
		resource = v1beta1.PoolResource
	}
	return s.dynamic.Resource(resource).UpdateStatus(ctx, u, metav1.UpdateOptions{})
}

// desired returns what the status of an object has to be, and whether it is another. Before the object as it is now has
// been mirrored, it has to be as it is.
func (s *status) desired(kind string, u *unstructured.Unstructured) (want any, differs bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if kind == poolKind {
		raw, _, _ := unstructured.NestedMap(u.Object, "status") // what is not a map is to be replaced
		usage, ok := s.usage[u.GetName()]
		var old v1beta1.ExternalIPPoolStatus
		err := runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &old)
		return &v1beta1.ExternalIPPoolStatus{Usage: usage}, ok && (err != nil || raw["usage"] == nil || old.Usage != usage)
	}
	v, ok := s.verdicts[u.GetName()]
	if !ok || v.uid != u.GetUID() || v.generation != u.GetGeneration() {
		return nil, false
	}
	old := s.decoded[u.GetName()]
	if old.of != u {
		old = decoded{u, readStatus(u)}
		s.decoded[u.GetName()] = old
	}
	status := egressStatus(old.status, v, s.cluster, time.Now())
	return &status, !equalStatus(old.status, status)
}

// readClusterState reads from the cache what agents and operators write. A record that cannot be read counts as none.
func readClusterState(c *store.Cache) clusterState {
	faults := map[string]error{} // their writers, and the agents, report them
	s := clusterState{
		Snapshot: egress.Snapshot{
			Owners:  map[netip.Addr]egress.Owner{},
			Agents:  decodeAll[egress.Agent](c, store.AgentPrefix, faults),
			Cordons: decodeAll[egress.Cordon](c, store.CordonPrefix, faults),
		},
		load: map[string]int{},
	}
	for _, o := range decodeAll[egress.Owner](c, store.OwnerPrefix, faults) {
		s.Owners[o.IP] = o
		s.load[o.Node]++
	}
	s.faulty, s.droppers = map[string][]string{}, map[netip.Addr][]string{}
	faulty := false
	for _, node := range slices.Sorted(maps.Keys(s.Agents)) {
		for ip := range s.Agents[node].Dropped {
			s.droppers[ip] = append(s.droppers[ip], node)
		}
		faulty = faulty || len(s.Agents[node].Faults) > 0
	}
	if !faulty {
		return s
	}
	for node, names := range listedMembers(c) {
		if len(s.Agents[node].Faults) > 0 {
			for name := range names {
				s.faulty[name] = append(s.faulty[name], node)
			}
		}
	}
	for _, nodes := range s.faulty {
		slices.Sort(nodes)
	}
	return s
}
