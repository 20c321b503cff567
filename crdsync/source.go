package crdsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/crdsync/spec"
	"github.com/egret-project/egret/egress"
)

// The indexes of the pods.
const (
	byNode      = "node"
	byIP        = "ip"                 // by neighbourhood
	byNamespace = cache.NamespaceIndex // the informer's own
)

// source is what the Kubernetes API shows. Egresses and pools are taken as they come and converted one by one, so that
// one that cannot be read does not stop the others.
type source struct {
	egresses, pools, namespaces, pods, nodes cache.SharedIndexInformer
	// services are the ServiceCIDRs; nil: this API server has none, or does not show them.
	services cache.SharedIndexInformer

	start    func(context.Context)
	shutdown func()
	defaults nodeDefaults
	dirty    *dirty
	status   func(kind, name string) // an Egress or ExternalIPPool is to be looked at
}

func newSource(ctx context.Context, kube *rest.Config, defaults nodeDefaults, d *dirty, status func(kind, name string)) (*source, error) {
	patient := rest.CopyConfig(kube)
	patient.Dial = func(dial context.Context, network, address string) (net.Conn, error) {
		return reach(ctx, dial, kube.Dial, network, address)
	}
	dyn, err := dynamic.NewForConfig(patient)
	if err != nil {
		return nil, fmt.Errorf("making a client of the Kubernetes API: %w", err)
	}
	typed := rest.CopyConfig(patient)
	// all pods of a cluster: JSON costs several times more
	typed.ContentConfig.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(typed)
	if err != nil {
		return nil, fmt.Errorf("making a client of the Kubernetes API: %w", err)
	}
	objects := dynamicinformer.NewFilteredDynamicSharedInformerFactory(dyn, 0, metav1.NamespaceAll, latest)
	core := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(defaults.trim), informers.WithTweakListOptions(latest))
	s := &source{
		egresses:   objects.ForResource(v1beta1.EgressResource).Informer(),
		pools:      objects.ForResource(v1beta1.PoolResource).Informer(),
		namespaces: core.Core().V1().Namespaces().Informer(),
		pods:       core.Core().V1().Pods().Informer(),
		nodes:      core.Core().V1().Nodes().Informer(),
		start:      func(ctx context.Context) { objects.Start(ctx.Done()); core.Start(ctx.Done()) },
		shutdown:   func() { objects.Shutdown(); core.Shutdown() },
		defaults:   defaults, dirty: d, status: status,
	}
	for _, informer := range []cache.SharedIndexInformer{s.egresses, s.pools} {
		if err := informer.SetTransform(trimManagedFields); err != nil {
			return nil, fmt.Errorf("watching the Kubernetes API: %w", err)
		}
	}
	// Kubernetes has them since 1.33.
	switch _, err := client.NetworkingV1().ServiceCIDRs().List(ctx, metav1.ListOptions{Limit: 1}); {
	case err == nil:
		s.services = core.Networking().V1().ServiceCIDRs().Informer()
		if _, err := s.services.AddEventHandler(handler(func(_, _ *networkingv1.ServiceCIDR) { d.add(work{nodes: true}) })); err != nil {
			return nil, fmt.Errorf("watching the Kubernetes API: %w", err)
		}
	case !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err):
		return nil, fmt.Errorf("reading ServiceCIDRs: %w", err)
	}
	if err := s.pods.AddIndexers(cache.Indexers{byNode: nodeIndex, byIP: ipIndex}); err != nil {
		return nil, fmt.Errorf("indexing pods: %w", err)
	}
	_, err1 := s.egresses.AddEventHandler(s.object(egressKind))
	_, err2 := s.pools.AddEventHandler(s.object(poolKind))
	_, err3 := s.namespaces.AddEventHandler(handler(s.namespaceChanged))
	_, err4 := s.pods.AddEventHandler(handler(s.podChanged))
	_, err5 := s.nodes.AddEventHandler(handler(s.nodeChanged))
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return nil, fmt.Errorf("watching the Kubernetes API: %w", err)
	}
	return s, nil
}

// latest makes a list that may be as old as the API server's cache one of what there is now. An informer begins with
// such a list where the API server does not stream it, and that cache may be behind what the leader before has seen: it
// would be undone.
func latest(o *metav1.ListOptions) {
	if o.ResourceVersion == "0" {
		o.ResourceVersion = ""
	}
}

// reach connects with a server, and waits for one that is not there. The informers, left to themselves, wait twice as
// long after each attempt, half a minute in the end, and each for itself: an API server that is back would go unnoticed
// for as long.
func reach(ctx, dial context.Context, by func(context.Context, string, string) (net.Conn, error), network, address string) (net.Conn, error) {
	if by == nil {
		by = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	}
	for {
		c, err := by(dial, network, address)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-dial.Done():
			return nil, err
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// run watches the API until ctx ends.
func (s *source) run(ctx context.Context) {
	s.start(ctx)
	<-ctx.Done()
	s.shutdown()
}

// synced waits until everything was listed once. false: ctx ended.
func (s *source) synced(ctx context.Context) bool {
	all := []cache.InformerSynced{s.egresses.HasSynced, s.pools.HasSynced, s.namespaces.HasSynced, s.pods.HasSynced, s.nodes.HasSynced}
	if s.services != nil {
		all = append(all, s.services.HasSynced)
	}
	return cache.WaitForCacheSync(ctx.Done(), all...)
}

// handler calls changed with the old and the new object; old is nil for a new one, new for one that is gone.
func handler[T any](changed func(from, to *T)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { changed(nil, object[T](o)) },
		UpdateFunc: func(a, b any) { changed(object[T](a), object[T](b)) },
		DeleteFunc: func(o any) { changed(object[T](o), nil) },
	}
}

// object returns the object of an event; nil when there is none.
func object[T any](o any) *T {
	if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = gone.Obj
	}
	t, _ := o.(*T)
	return t
}

// object handles the events of a kind. An update that leaves the generation is one of the status: there is nothing to
// mirror.
func (s *source) object(kind string) cache.ResourceEventHandler {
	return handler(func(from, to *unstructured.Unstructured) {
		for _, u := range []*unstructured.Unstructured{to, from} { // one that is gone has last Events
			if u != nil {
				s.status(kind, u.GetName())
			}
		}
		if from == nil || to == nil || from.GetGeneration() != to.GetGeneration() || from.GetUID() != to.GetUID() {
			s.dirty.add(work{objects: true})
		}
	})
}

func (s *source) namespaceChanged(from, to *corev1.Namespace) {
	if from == nil || to == nil || !maps.Equal(from.Labels, to.Labels) {
		s.dirty.add(work{namespaces: map[string]bool{cmp.Or(to, from).Name: true}})
	}
}

// nodeChanged leaves out the heartbeats of kubelets, every few minutes or seconds.
func (s *source) nodeChanged(from, to *corev1.Node) {
	if from != nil && to != nil {
		was, err1 := readNode(from, s.defaults)
		is, err2 := readNode(to, s.defaults)
		if reflect.DeepEqual(was, is) && (err1 == nil) == (err2 == nil) && (err1 == nil || err1.Error() == err2.Error()) {
			return
		}
	}
	s.dirty.add(work{nodes: true})
}

// podChanged marks the node of the pod, and those of other pods that list the same IP: it may change hands.
func (s *source) podChanged(from, to *keptPod) {
	w := work{pods: map[string]bool{}}
	var seen []pod
	for _, k := range []*keptPod{from, to} {
		if k == nil {
			continue
		}
		if p, ok := k.read(); ok {
			seen = append(seen, p)
		}
	}
	if len(seen) == 0 || len(seen) == 2 && reflect.DeepEqual(seen[0], seen[1]) {
		return
	}
	for _, p := range seen {
		w.pods[p.node] = true
		for _, ip := range p.ips {
			for _, other := range s.podsWith(ip) {
				w.pods[other.node] = true
			}
		}
	}
	s.dirty.add(w)
}

func nodeIndex(o any) ([]string, error) {
	if p, ok := o.(*keptPod).read(); ok {
		return []string{p.node}, nil
	}
	return nil, nil
}

func ipIndex(o any) (out []string, err error) {
	for _, ip := range o.(*keptPod).ips {
		out = append(out, neighbourhood(ip))
	}
	return out, nil
}

// podsBy returns the pods that count, by one of the indexes.
func (s *source) podsBy(index, value string) []pod {
	objects, _ := s.pods.GetIndexer().ByIndex(index, value) // fails only for an index that does not exist
	out := make([]pod, 0, len(objects))
	for _, o := range objects {
		if p, ok := o.(*keptPod).read(); ok {
			out = append(out, p)
		}
	}
	return out
}

// podsWith returns the pods that list an IP.
func (s *source) podsWith(ip netip.Addr) (out []pod) {
	objects, _ := s.pods.GetIndexer().ByIndex(byIP, neighbourhood(ip)) // fails only for an index that does not exist
	for _, o := range objects {
		if k := o.(*keptPod); slices.Contains(k.ips, ip) {
			p, _ := k.read() // one that has IPs counts
			out = append(out, p)
		}
	}
	return out
}

// owns reports whether an IP that a pod lists is the pod's own.
func (s *source) owns(p pod, ip netip.Addr) bool {
	all := s.podsWith(ip)
	return len(all) < 2 || holder(all).name == p.name
}

// nodesWithPods returns the names of the nodes that have pods that count.
func (s *source) nodesWithPods() []string { return s.pods.GetIndexer().ListIndexFuncValues(byNode) }

// namespaceLabels returns the labels of a namespace; false when it is not seen yet.
func (s *source) namespaceLabels(name string) (labels.Set, bool) {
	if o, ok, _ := s.namespaces.GetIndexer().GetByKey(name); ok {
		return o.(*corev1.Namespace).Labels, true
	}
	return nil, false
}

// objects returns all objects but pods, read.
func (s *source) objects() (o objects, faults map[string]error) {
	o = objects{pools: map[string]egress.Pool{}, unread: map[string]error{}, overlap: map[string]error{}}
	for _, e := range s.egresses.GetIndexer().List() {
		o.demands = append(o.demands, readEgress(e.(*unstructured.Unstructured)))
	}
	slices.SortFunc(o.demands, byAge)
	pools := s.pools.GetIndexer().List()
	slices.SortFunc(pools, func(a, b any) int {
		x, y := a.(*unstructured.Unstructured), b.(*unstructured.Unstructured)
		return cmp.Or(x.GetCreationTimestamp().Compare(y.GetCreationTimestamp().Time), cmp.Compare(x.GetName(), y.GetName()))
	})
	for _, e := range pools { // the oldest first: those before it are older
		u := e.(*unstructured.Unstructured)
		p, err := readPool(u)
		if err != nil {
			o.unread[u.GetName()] = err
			continue
		}
		if err := spec.Overlap(p, o.pools); err != nil {
			o.overlap[p.Name] = err
		}
		o.pools[p.Name] = p
	}
	faults = map[string]error{}
	for _, e := range s.nodes.GetIndexer().List() {
		n, err := readNode(e.(*corev1.Node), s.defaults)
		if err != nil {
			faults["node "+n.Name] = err
		}
		o.nodes = append(o.nodes, n)
	}
	slices.SortFunc(o.nodes, func(a, b egress.Node) int { return cmp.Compare(a.Name, b.Name) })
	if s.services == nil {
		return o, faults
	}
	o.services = []egress.ServiceCIDR{}
	for _, e := range s.services.GetIndexer().List() {
		c, err := readServiceCIDR(e.(*networkingv1.ServiceCIDR))
		if err != nil {
			faults["ServiceCIDR "+c.Name] = err
		}
		o.services = append(o.services, c)
	}
	return o, faults
}

// trim drops what crdsync does not read: most of a node, and all but a keptPod of a pod. What it has returned, it
// leaves as it is.
func (d nodeDefaults) trim(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		return keepPod(o), nil
	case *corev1.Node:
		n := &corev1.Node{
			ObjectMeta: trimMeta(o.ObjectMeta),
			Spec:       corev1.NodeSpec{PodCIDR: o.Spec.PodCIDR, PodCIDRs: o.Spec.PodCIDRs, Unschedulable: o.Spec.Unschedulable, Taints: leavingTaints(o)},
			Status:     corev1.NodeStatus{Addresses: o.Status.Addresses, Conditions: shutdown(o)},
		}
		for _, t := range o.Spec.Taints {
			if d.startupTaint != "" && t.Key == d.startupTaint {
				n.Spec.Taints = append(n.Spec.Taints, t)
			}
		}
		if limit, ok := o.Annotations[capacityAnnotation]; ok {
			n.Annotations = map[string]string{capacityAnnotation: limit}
		}
		return n, nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: trimMeta(o.ObjectMeta)}, nil
	}
	return o, nil
}

// trimManagedFields drops most of an Egress. The API server keeps them where an update has none: a status is written
// without.
func trimManagedFields(o any) (any, error) {
	if u, ok := o.(*unstructured.Unstructured); ok {
		u.SetManagedFields(nil)
	}
	return o, nil
}

func trimMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion, CreationTimestamp: m.CreationTimestamp,
		DeletionTimestamp: m.DeletionTimestamp, Labels: m.Labels,
	}
}
