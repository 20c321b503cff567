package crdsync

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kuberuntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

// api is an API server that has objects of realistic size, keeps none, and tells of no change. Pods are streamed, as
// since 1.32, all others listed.
type api struct{ load }

func (a api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v := r.URL.Query()
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	switch {
	case v.Get("sendInitialEvents") == "true" && resource == "pods":
		stream(w, r, a.pods, a.pod, func(p *corev1.Pod) kuberuntime.Object { p.TypeMeta = kind("Pod"); return p })
	case v.Get("sendInitialEvents") == "true":
		http.Error(w, "lists are not streamed", http.StatusUnprocessableEntity)
	case v.Get("watch") == "true":
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case r.Method != http.MethodGet: // a status, or an Event
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		_, _ = io.Copy(w, r.Body)
	case resource == "pods":
		items, more := pageOf(r, a.pods, a.pod)
		a.protobuf(w, &corev1.PodList{TypeMeta: kind("PodList"), ListMeta: more, Items: items})
	case resource == "nodes":
		items, more := pageOf(r, a.nodes, a.nodeObject)
		a.protobuf(w, &corev1.NodeList{TypeMeta: kind("NodeList"), ListMeta: more, Items: items})
	case resource == "namespaces":
		items, more := pageOf(r, a.namespaces, func(i int) corev1.Namespace {
			return corev1.Namespace{ObjectMeta: meta("", a.namespace(i), map[string]string{corev1.LabelMetadataName: a.namespace(i)})}
		})
		a.protobuf(w, &corev1.NamespaceList{TypeMeta: kind("NamespaceList"), ListMeta: more, Items: items})
	case resource == "egresses":
		items, more := pageOf(r, a.egresses(), a.egress)
		a.json(w, "EgressList", more, items)
	case resource == "externalippools":
		items, more := pageOf(r, 2, func(i int) any {
			cidr := []string{"10.12.0.0/16", "fd12::/112"}[i]
			return custom("ExternalIPPool", meta("", fmt.Sprint("pool-", i), nil), map[string]any{"ipRanges": []any{map[string]any{"cidr": cidr}}, "nodeSelector": map[string]any{"matchLabels": map[string]any{"gateway": "yes"}}}, nil)
		})
		a.json(w, "ExternalIPPoolList", more, items)
	default:
		http.NotFound(w, r)
	}
}

// pageOf returns the objects that a list asks for, and where the next ones begin.
func pageOf[T any](r *http.Request, n int, object func(int) T) (items []T, more metav1.ListMeta) {
	from, _ := strconv.Atoi(r.URL.Query().Get("continue"))
	limit, _ := strconv.Atoi(r.URL.Query().Get("limit"))
	more.ResourceVersion = "1"
	to := n
	if limit > 0 && from+limit < n {
		to = from + limit
		more.Continue = fmt.Sprint(to)
	}
	for i := from; i < to; i++ {
		items = append(items, object(i))
	}
	return items, more
}

// stream sends n objects, and that these are all, as events of a watch.
func stream[T any](w http.ResponseWriter, r *http.Request, n int, object func(int) T, encodable func(*T) kuberuntime.Object) {
	w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
	frames := protobuf.LengthDelimitedFramer.NewFrameWriter(w)
	send := func(what string, o kuberuntime.Object) {
		var whole bytes.Buffer
		_ = protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(o, &whole)
		e := &metav1.WatchEvent{Type: what, Object: kuberuntime.RawExtension{Raw: whole.Bytes()}}
		frame, _ := e.Marshal()
		_, _ = frames.Write(frame)
	}
	for i := range n {
		o := object(i)
		send("ADDED", encodable(&o))
	}
	var last T
	o := encodable(&last)
	m := o.(metav1.Object)
	m.SetResourceVersion("123456789")
	m.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	send("BOOKMARK", o)
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

func kind(name string) metav1.TypeMeta { return metav1.TypeMeta{APIVersion: "v1", Kind: name} }

func (a api) protobuf(w http.ResponseWriter, list kuberuntime.Object) {
	w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
	_ = protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(list, w)
}

func (a api) json(w http.ResponseWriter, kind string, more metav1.ListMeta, items []any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"apiVersion": "crd.antrea.io/v1beta1", "kind": kind, "metadata": more, "items": items})
}

func meta(namespace, name string, labels map[string]string) metav1.ObjectMeta {
	now := metav1.NewTime(time.Now().Truncate(time.Second))
	fields := `{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"main\"}":{".":{},"f:image":{},"f:name":{},"f:resources":{}}}}}`
	return metav1.ObjectMeta{
		Namespace: namespace, Name: name, Labels: labels, UID: types.UID(fmt.Sprintf("%08x-0000-4000-8000-%012x", len(name), name)[:36]),
		ResourceVersion: "123456789", Generation: 1, CreationTimestamp: now,
		ManagedFields: []metav1.ManagedFieldsEntry{
			{Manager: "kubectl", Operation: metav1.ManagedFieldsOperationApply, APIVersion: "v1", Time: &now, FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(fields)},
			{Manager: "kubelet", Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", Time: &now, FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(fields)},
		},
	}
}

// podName is as long as those of Deployments are.
func (a api) podName(i int) string { return fmt.Sprintf("app-%02d-7c9d8f6b54-%05d", a.app(i), i) }

func (a api) pod(i int) corev1.Pod {
	app := fmt.Sprint(a.app(i))
	host := i/a.nodes + 2
	n := (i + host*37) % a.nodes // the pods of a node are of many egresses
	v4, v6 := fmt.Sprintf("10.%d.%d.%d", 64+n>>10, n>>2&255, n&3<<6+host), fmt.Sprintf("fd44:%x::%x", n, host)
	p := corev1.Pod{
		ObjectMeta: meta(a.namespace(i), a.podName(i), map[string]string{
			"app": app, "app.kubernetes.io/name": "app-" + app, "app.kubernetes.io/instance": a.namespace(i) + "-app-" + app, "app.kubernetes.io/version": "1.2.3",
			"app.kubernetes.io/managed-by": "Helm", "pod-template-hash": "7c9d8f6b54",
		}),
		Spec: corev1.PodSpec{
			NodeName: a.nodeName(n), ServiceAccountName: "default", SchedulerName: "default-scheduler",
			Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/app:1.2.3", Env: []corev1.EnvVar{{Name: "KEY", Value: "value"}}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, HostIP: "192.0.2.1", PodIP: v4, PodIPs: []corev1.PodIP{{IP: v4}, {IP: v6}},
			Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: corev1.PodScheduled, Status: corev1.ConditionTrue}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "main", Ready: true, Image: "registry.invalid/app:1.2.3", ImageID: "sha256:0123456789abcdef"}},
		},
	}
	p.Annotations = map[string]string{"prometheus.io/scrape": "true", "checksum/config": "0123456789abcdef0123456789abcdef"}
	return p
}

func (a api) nodeName(n int) string { return fmt.Sprintf("node-%05d.cluster.invalid", n) }

func (a api) nodeObject(n int) corev1.Node {
	o := corev1.Node{ObjectMeta: meta("", a.nodeName(n), map[string]string{corev1.LabelHostname: a.nodeName(n), corev1.LabelOSStable: "linux", corev1.LabelTopologyZone: "zone-1"})}
	if n < gateways {
		o.Labels["gateway"] = "yes"
	}
	o.Spec.PodCIDRs = []string{fmt.Sprintf("10.%d.%d.%d/26", 64+n>>10, n>>2&255, n&3<<6), fmt.Sprintf("fd44:%x::/64", n)}
	o.Spec.PodCIDR = o.Spec.PodCIDRs[0]
	o.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("10.11.%d.%d", n>>8, n&255)}}
	return o
}

func (a api) egress(i int) any {
	match := func(k, v string) map[string]any { return map[string]any{"matchLabels": map[string]any{k: v}} }
	v4, v6 := a.ips(i)[0].String(), a.ips(i)[1].String()
	var conditions []any
	for _, t := range []string{"IPAllocated", "IPAssigned", "Conflict", "Degraded"} {
		conditions = append(conditions, map[string]any{
			"type": t, "status": "True", "reason": "Done", "message": "said of it", "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
		})
	}
	return custom("Egress", meta("", fmt.Sprintf("e-%05d", i), map[string]string{"team": "one"}),
		map[string]any{
			"externalIPPools": []any{"pool-0", "pool-1"},
			"appliedTo":       map[string]any{"namespaceSelector": match(corev1.LabelMetadataName, a.namespace(i)), "podSelector": match("app", fmt.Sprint(i/a.namespaces))},
		},
		map[string]any{"egressIP": v4, "egressNode": "", "addresses": []any{map[string]any{"ip": v4}, map[string]any{"ip": v6}}, "conditions": conditions})
}

const gateways = 50

// assign gives all IPs an owner, a hundred a transaction: what a status says of IPs without one is another measurement.
func (a api) assign(ctx context.Context, etcd *clientv3.Client) error {
	var ops []clientv3.Op
	for i := range a.egresses() {
		for _, ip := range a.ips(i) {
			v, err := store.Encode(egress.Owner{IP: ip, Node: a.nodeName(i % gateways), Why: egress.ReasonClaim})
			if err != nil {
				return err
			}
			ops = append(ops, clientv3.OpPut(store.DefaultPrefix+store.OwnerKey(ip), string(v)))
		}
	}
	for some := range slices.Chunk(ops, 100) {
		if _, err := etcd.Txn(ctx).Then(some...).Commit(); err != nil {
			return err
		}
	}
	return nil
}

// ips returns the addresses that the status of an egress has, and which it gets.
func (a api) ips(i int) []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 12, byte((i + 1) >> 8), byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd12::%x", i+1))}
}

func custom(kind string, m metav1.ObjectMeta, spec, status map[string]any) any {
	return map[string]any{"apiVersion": "crd.antrea.io/v1beta1", "kind": kind, "metadata": m, "spec": spec, "status": status}
}

// BenchmarkMemory says how much memory crdsync needs at rest: what is alive on its heap (MB-live), and what the process
// of the test has of the machine's (MB-rss), beside an API server and an etcd that are processes of their own.
// EGRET_MEMORY_PROFILE names a file for a heap profile.
func BenchmarkMemory(b *testing.B) {
	for _, l := range []load{{namespaces: 20, apps: 25, nodes: 500, pods: 10_000}, {namespaces: 100, apps: 50, nodes: 5000, pods: 100_000}} {
		b.Run(fmt.Sprintf("pods=%d", l.pods), func(b *testing.B) {
			if os.Getenv(memoryServers) != "" {
				serveMemory(b, l)
				return
			}
			for b.Loop() {
				measureMemory(b, l)
			}
			b.ReportMetric(0, "ns/op") // it says nothing that the others do not
		})
	}
}

// memoryServers is set in the environment of a test that is not the measured one, but its servers.
const memoryServers = "EGRET_MEMORY_SERVERS"

// serveMemory serves until its standard input ends, and prints where.
func serveMemory(b *testing.B, l load) {
	server := httptest.NewServer(api{l})
	defer server.Close()
	defer server.CloseClientConnections()
	fmt.Println("serving", server.URL, etcdtest.New(b).Endpoint())
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func measureMemory(b *testing.B, l load) {
	servers := exec.Command(os.Args[0], "-test.run=^$", "-test.bench=^BenchmarkMemory$/^"+strings.SplitN(b.Name(), "/", 2)[1]+"$", "-test.benchtime=1x")
	servers.Env = append(os.Environ(), memoryServers+"=1")
	in, err1 := servers.StdinPipe()
	out, err2 := servers.StdoutPipe()
	if err := errors.Join(err1, err2, servers.Start()); err != nil {
		b.Fatal(err)
	}
	defer func() { in.Close(); _ = servers.Wait() }()
	url, endpoint := "", ""
	lines := bufio.NewScanner(out)
	for url == "" && lines.Scan() {
		if _, where, ok := strings.Cut(lines.Text(), "serving "); ok {
			url, endpoint, _ = strings.Cut(where, " ")
		}
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	client, err := store.Dial(b.Context(), store.Config{Endpoints: []string{endpoint}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	if err := (api{l}).assign(b.Context(), client.Etcd()); err != nil {
		b.Fatal(err)
	}
	// The first start fills etcd; at rest is the second one, which reads it.
	kube := &rest.Config{Host: url, QPS: -1}
	start, usedBefore := time.Now(), used(b)
	run := func() (stop func()) {
		registry := prometheus.NewRegistry()
		ctx, cancel := context.WithCancel(b.Context())
		done := make(chan error, 1)
		go func() {
			done <- Run(ctx, Config{Kube: kube, Store: client, ID: "test", ElectionTTL: 10 * time.Second, Log: slog.New(slog.DiscardHandler), Metrics: registry})
		}()
		awaitPass(b, registry)
		quiet(b, client)
		return func() {
			cancel()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
	}
	stop := run()
	b.ReportMetric((time.Since(start) - quietFor).Seconds(), "s-start")
	b.ReportMetric(used(b)-usedBefore, "cpu-s-start")
	stop()
	before := collected().HeapAlloc
	stop = run()
	b.ReportMetric(float64(field(b, "VmRSS"))/1e3, "MB-rss")
	b.ReportMetric(float64(field(b, "VmHWM"))/1e3, "MB-rss-most")
	with := collected().HeapAlloc
	if name := os.Getenv("EGRET_MEMORY_PROFILE"); name != "" {
		f, err := os.Create(name)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		if err := pprof.WriteHeapProfile(f); err != nil {
			b.Fatal(err)
		}
	}
	stop()
	b.ReportMetric(float64(with-min(before, collected().HeapAlloc))/1e6, "MB-live")
}

// awaitPass waits for the first pass, which has read all and written what differs.
func awaitPass(b *testing.B, registry *prometheus.Registry) {
	b.Helper()
	for {
		all, err := registry.Gather()
		if err != nil {
			b.Fatal(err)
		}
		for _, f := range all {
			if f.GetName() == metricPass.Name && f.GetMetric()[0].GetHistogram().GetSampleCount() > 0 {
				return
			}
		}
		time.Sleep(time.Second)
	}
}

const quietFor = 5 * time.Second

// quiet waits until nothing was written to etcd for quietFor.
func quiet(b *testing.B, client *store.Client) {
	b.Helper()
	for last, since := int64(0), time.Now(); time.Since(since) < quietFor; time.Sleep(200 * time.Millisecond) {
		r, err := client.Etcd().Get(b.Context(), store.DefaultPrefix+store.MembersByEgress, clientv3.WithCountOnly())
		if err != nil {
			b.Fatal(err)
		}
		if r.Header.Revision != last {
			last, since = r.Header.Revision, time.Now()
		}
	}
}

// collected collects the garbage, and returns what is left.
func collected() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

// field returns a field of /proc/self/status, in kB.
func field(b *testing.B, name string) (kB int) {
	all, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(all), name+":")
	if _, err := fmt.Sscan(rest, &kB); err != nil {
		b.Fatalf("reading %s: %v", name, err)
	}
	return kB
}

// used returns the seconds of CPU that the process has used.
func used(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}
