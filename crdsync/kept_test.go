package crdsync

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

func TestLabelSetsAreEqualWhereTheirLabelsAre(t *testing.T) {
	sets := []map[string]string{
		nil, {"a": ""}, {"a": "b"}, {"a": "b", "c": ""}, {"a": "", "b": "c"}, {"a": "", "b": "", "c": ""}, {"ab": ""}, {"a": "b", "c": "d"}, {"a.b/c": "d_e-f.g"},
	}
	for i, a := range sets {
		if got := newLabelSet(a).set(); !maps.Equal(got, a) {
			t.Errorf("%v came back as %v", a, got)
		}
		for j, b := range sets {
			if equal := newLabelSet(a) == newLabelSet(maps.Clone(b)); equal != (i == j) {
				t.Errorf("%v and %v: equal %t", a, b, equal)
			}
		}
	}
}

// TestAKeptPodSaysWhatThePodSays reads pods from what the informer keeps, and compares with the objects.
func TestAKeptPodSaysWhatThePodSays(t *testing.T) {
	base := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "prod", Name: "web", ResourceVersion: "7", Labels: map[string]string{"app": "web"}, CreationTimestamp: metav1.Unix(5, 0)},
		Spec:       corev1.PodSpec{NodeName: "node-1"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "fd00::1"}, {IP: "10.0.0.1"}}},
	}
	for name, change := range map[string]func(*corev1.Pod){
		"running":       func(*corev1.Pod) {},
		"being deleted": func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(9, 0)} },
		"ended":         func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed },
		"without an IP": func(p *corev1.Pod) { p.Status.PodIPs = nil },
	} {
		p := base.DeepCopy()
		change(p)
		once, err := nodeDefaults{}.trim(p)
		if err != nil {
			t.Fatal(err)
		}
		kept, err := nodeDefaults{}.trim(once) // the informer gives back what it was streamed first
		if err != nil || kept != once {
			t.Errorf("%s: trimming again returns %v, %v", name, kept, err)
		}
		want, counts := readPod(p)
		got, ok := kept.(*keptPod).read()
		if ok != counts || ok && !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %t, want %+v, %t", name, got, ok, want, counts)
		}
		key, err := cache.MetaNamespaceKeyFunc(kept)
		if version := kept.(*keptPod).GetObjectMeta().GetResourceVersion(); err != nil || key != "prod/web" || version != "7" {
			t.Errorf("%s: key %q, version %q, %v", name, key, version, err)
		}
	}
}

// TestNeighboursHaveNoAddressInCommon: the index finds the pods of 16 addresses, of which those with another one are no
// holders.
func TestNeighboursHaveNoAddressInCommon(t *testing.T) {
	pods := cache.NewSharedIndexInformer(nil, nil, 0, cache.Indexers{byNode: nodeIndex, byIP: ipIndex})
	add := func(name, node string, created int64, ips ...string) {
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "prod", Name: name, CreationTimestamp: metav1.Unix(created, 0)},
			Spec:       corev1.PodSpec{NodeName: node},
		}
		for _, text := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: text})
		}
		if err := pods.GetIndexer().Add(keepPod(p)); err != nil {
			t.Fatal(err)
		}
	}
	add("a", "n1", 1, "10.0.0.0", "fd00::")
	add("b", "n1", 2, "10.0.0.15", "fd00::f")
	add("c", "n2", 3, "10.0.0.16", "fd00::10")
	add("d", "n2", 4, "10.0.0.15") // given anew
	s := &source{pods: pods}
	for text, want := range map[string][]string{
		"10.0.0.0": {"prod/a"}, "fd00::": {"prod/a"}, "10.0.0.15": {"prod/b", "prod/d"}, "fd00::f": {"prod/b"}, "10.0.0.16": {"prod/c"}, "10.0.0.1": nil,
		"::a00:0": nil, // the bytes of 10.0.0.0 at its end
	} {
		var got []string
		for _, p := range s.podsWith(netip.MustParseAddr(text)) {
			got = append(got, p.name)
		}
		slices.Sort(got)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", text, d)
		}
	}
	for _, p := range s.podsBy(byNode, "n1") {
		if owns := s.owns(p, netip.MustParseAddr("10.0.0.15")); p.name == "prod/b" && owns {
			t.Error("prod/b has an IP that a newer pod has")
		}
	}
}
