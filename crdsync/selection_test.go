package crdsync

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/crdsync/spec"
	"github.com/egret-project/egret/egress"
)

func matching(kv ...string) *v1beta1.LabelSelector {
	s := &v1beta1.LabelSelector{MatchLabels: map[string]v1beta1.LabelValue{}}
	for i := 0; i < len(kv); i += 2 {
		s.MatchLabels[kv[i]] = v1beta1.LabelValue(kv[i+1])
	}
	return s
}

func TestAppliedToSelectsAsTheGuideSays(t *testing.T) {
	tests := map[string]struct {
		applied v1beta1.AppliedTo
		want    []string
	}{
		"empty selects nothing":                      {v1beta1.AppliedTo{}, nil},
		"a podSelector alone selects everywhere":     {v1beta1.AppliedTo{PodSelector: matching("role", "web")}, []string{"prod/web", "test/web"}},
		"a namespaceSelector alone selects all pods": {v1beta1.AppliedTo{NamespaceSelector: matching("env", "prod")}, []string{"prod/db", "prod/web"}},
		"both select what matches both": {
			v1beta1.AppliedTo{NamespaceSelector: matching("env", "prod"), PodSelector: matching("role", "web")}, []string{"prod/web"},
		},
		"an empty podSelector selects all":       {v1beta1.AppliedTo{PodSelector: matching()}, []string{"prod/db", "prod/web", "test/web"}},
		"an empty namespaceSelector selects all": {v1beta1.AppliedTo{NamespaceSelector: matching()}, []string{"prod/db", "prod/web", "test/web"}},
	}
	pods := []pod{
		{name: "prod/db", namespace: "prod", labels: newLabelSet(map[string]string{"role": "db"})},
		{name: "prod/web", namespace: "prod", labels: newLabelSet(map[string]string{"role": "web"})},
		{name: "test/web", namespace: "test", labels: newLabelSet(map[string]string{"role": "web"})},
	}
	for name, tt := range tests {
		var s selector
		var err error
		s.namespaces, s.pods, err = spec.AppliedTo(tt.applied)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var got []string
		for _, p := range pods {
			if s.namespaces.Matches(labels.Set{"env": p.namespace}) && s.pods.Matches(p.labels.set()) {
				got = append(got, p.name)
			}
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestPodsThatCount(t *testing.T) {
	base := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "prod", Name: "web"},
		Spec:       corev1.PodSpec{NodeName: "node-1"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "::ffff:10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}}},
	}
	tests := map[string]struct {
		change func(*corev1.Pod)
		want   bool
	}{
		"running":                  {func(p *corev1.Pod) {}, true},
		"pending with an IP":       {func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }, true},
		"being deleted":            {func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }, true},
		"succeeded":                {func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, false},
		"failed":                   {func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, false},
		"in the network of a node": {func(p *corev1.Pod) { p.Spec.HostNetwork = true }, false},
		"not scheduled":            {func(p *corev1.Pod) { p.Spec.NodeName = "" }, false},
		"without an IP":            {func(p *corev1.Pod) { p.Status = corev1.PodStatus{} }, false},
	}
	for name, tt := range tests {
		p := base.DeepCopy()
		tt.change(p)
		got, ok := readPod(p)
		if ok != tt.want {
			t.Errorf("%s: counts %t, want %t", name, ok, tt.want)
		}
		if d := cmp.Diff([]netip.Addr{ip("10.0.0.1"), ip("fd00::1")}, got.ips, compareIPs); ok && d != "" {
			t.Errorf("%s: IPs (-want +got):\n%s", name, d)
		}
	}
}

func TestGroup(t *testing.T) {
	both := []string{"10.0.0.1", "fd00::1"}
	claim := func(name string, label string, fs ...family) claimant {
		return claimant{name: name, families: fs, applied: selector{labels.Everything(), labels.SelectorFromSet(labels.Set{label: "1"})}}
	}
	tests := map[string]struct {
		claimants []claimant
		labels    string
		ips       []string
		want      map[string][]string
	}{
		"one egress": {[]claimant{claim("a", "x", ipv4)}, "x", both[:1], map[string][]string{"a": {"10.0.0.1"}}},
		"the first of two": {
			[]claimant{claim("old", "x", ipv4), claim("a", "x", ipv4)}, "x", both[:1], map[string][]string{"old": {"10.0.0.1"}},
		},
		"each family has its egress": {
			[]claimant{claim("six", "x", ipv6), claim("four", "x", ipv4)}, "x", both, map[string][]string{"four": {"10.0.0.1"}, "six": {"fd00::1"}},
		},
		"an egress of an unknown family takes both": {
			[]claimant{claim("a", "x", ipv4, ipv6), claim("b", "x", ipv4)}, "x", both, map[string][]string{"a": both},
		},
		"a family that no egress takes is unselected": {
			[]claimant{claim("a", "x", ipv4)}, "x", both, map[string][]string{"a": {"10.0.0.1"}, egress.Unselected: {"fd00::1"}},
		},
		"one that loses all its pods": {
			[]claimant{claim("a", "x", families...), claim("b", "x", families...)}, "x", both, map[string][]string{"a": both},
		},
		"no egress": {[]claimant{claim("a", "y", ipv4)}, "x", both[:1], map[string][]string{egress.Unselected: {"10.0.0.1"}}},
	}
	for name, tt := range tests {
		p := pod{name: "prod/web", namespace: "prod", node: "node-1", labels: newLabelSet(map[string]string{tt.labels: "1"})}
		for _, s := range tt.ips {
			p.ips = append(p.ips, ip(s))
		}
		s := newSelection(tt.claimants, func(string) (labels.Set, bool) { return nil, true }, nil)
		got := map[string][]string{}
		for name, m := range s.group("node-1", []pod{p}, func(pod, netip.Addr) bool { return true }) {
			if m.Egress != name || m.Node != "node-1" || len(m.Pods) != 1 || m.Pods[0].Pod != "prod/web" {
				t.Errorf("%s: members %v", name, m)
			}
			for _, ip := range m.Pods[0].IPs {
				got[name] = append(got[name], ip.String())
			}
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestLosersAreThoseThatSelectThePodToo(t *testing.T) {
	claim := func(name string, s *v1beta1.LabelSelector) claimant {
		namespaces, pods, err := spec.AppliedTo(v1beta1.AppliedTo{PodSelector: s})
		if err != nil {
			t.Fatal(err)
		}
		return claimant{name: name, families: families, applied: selector{namespaces, pods}}
	}
	expression := func(op metav1.LabelSelectorOperator, values ...v1beta1.LabelValue) *v1beta1.LabelSelector {
		return &v1beta1.LabelSelector{MatchExpressions: []v1beta1.LabelSelectorRequirement{{Key: "app", Operator: op, Values: values}}}
	}
	s := newSelection([]claimant{
		claim("db", matching("app", "db")), claim("web", matching("app", "web")), claim("not-db", expression(metav1.LabelSelectorOpNotIn, "db")),
		claim("one-of-two", expression(metav1.LabelSelectorOpIn, "db", "web")), claim("in-web", expression(metav1.LabelSelectorOpIn, "web")),
		claim("all", matching()), claim("blue-web", matching("app", "web", "color", "blue")),
	}, func(string) (labels.Set, bool) { return nil, true }, nil)
	for range 2 { // looked up, and remembered
		winner, losers := s.owner(pod{name: "prod/a", namespace: "prod", labels: newLabelSet(map[string]string{"app": "web", "color": "red"})}, ipv4)
		if d := cmp.Diff([]string{"web", "not-db", "one-of-two", "in-web", "all"}, append([]string{winner}, losers...)); d != "" {
			t.Errorf("selected by (-want +got):\n%s", d)
		}
	}
}

func TestLosersSayWhoHasTheirPods(t *testing.T) {
	claim := func(name string, label string, fs ...family) claimant {
		return claimant{name: name, families: fs, applied: selector{labels.Everything(), labels.SelectorFromSet(labels.Set{label: "1"})}}
	}
	at := func(name, ips string, marks ...string) pod {
		p := pod{name: "prod/" + name, namespace: "prod"}
		for _, s := range strings.Fields(ips) {
			p.ips = append(p.ips, ip(s))
		}
		set := map[string]string{}
		for _, mark := range marks {
			set[mark] = "1"
		}
		p.labels = newLabelSet(set)
		return p
	}
	claimants := []claimant{claim("x4", "x", ipv4), claim("y", "y", families...), claim("z", "z", families...), claim("z6", "z", ipv6)}
	s := newSelection(claimants, func(string) (labels.Set, bool) { return nil, true }, nil)
	all := func(pod, netip.Addr) bool { return true }
	got := s.group("n1", []pod{at("c", "10.0.0.3", "x", "y", "z"), at("b", "10.0.0.2 fd00::2", "y", "z")}, all)
	members := map[string]egress.Members{
		"x4": {Egress: "x4", Node: "n1", Pods: []egress.Member{{Pod: "prod/c", IPs: []netip.Addr{ip("10.0.0.3")}, Also: []string{"y", "z"}}}},
		"y": {Egress: "y", Node: "n1", Pods: []egress.Member{
			{Pod: "prod/b", IPs: []netip.Addr{ip("10.0.0.2"), ip("fd00::2")}, Also: []string{"z", "z6"}},
		}},
	}
	if d := cmp.Diff(members, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	s.group("n2", []pod{at("a", "10.0.0.1", "y", "z")}, all)
	want := map[string]string{
		"y":  "pod prod/c is selected by egress x4 too, which comes first",
		"z":  "pod prod/c is selected by egress x4 too, which comes first; 2 pods, such as prod/a, are selected by egress y too, which comes first",
		"z6": "pod prod/b is selected by egress y too, which comes first",
	}
	if d := cmp.Diff(want, s.overlaps()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for n, text := range map[int]string{9: "9", 10: "10 or more", 99: "10 or more", 100: "100 or more", 12345: "10000 or more"} {
		if got := roughly(n); got != text {
			t.Errorf("%d pods: %s, want %s", n, got, text)
		}
	}
	s.group("n1", nil, all)
	want = map[string]string{"z": "pod prod/a is selected by egress y too, which comes first"}
	if d := cmp.Diff(want, s.overlaps()); d != "" {
		t.Errorf("after a node lost its pods (-want +got):\n%s", d)
	}
}

func TestAPodWhoseNamespaceIsNotSeenStaysWhatItWas(t *testing.T) {
	everything := claimant{name: "a", families: families, applied: selector{labels.Everything(), labels.Everything()}}
	p := pod{name: "prod/web", namespace: "prod", node: "node-1", ips: []netip.Addr{ip("10.0.0.1")}}
	for _, was := range []string{"a", egress.Unselected, ""} {
		s := newSelection([]claimant{everything}, func(string) (labels.Set, bool) { return nil, false }, func(name string, _ pod) bool { return name == was })
		got := s.group("node-1", []pod{p}, func(pod, netip.Addr) bool { return true })
		if _, ok := got[was]; ok != (was != "") || len(got) > 1 {
			t.Errorf("was %q: got %v", was, got)
		}
	}
}

func TestANamespaceThatIsRelabelledCostsThePodsThatChangeHands(t *testing.T) {
	in := func(env string) labels.Selector { return labels.SelectorFromSet(labels.Set{"env": env}) }
	web := labels.SelectorFromSet(labels.Set{"app": "web"})
	namespaces := map[string]labels.Set{"a": {"env": "prod"}, "b": {"env": "prod"}}
	s := newSelection([]claimant{
		{name: "prod", families: []family{ipv4}, applied: selector{in("prod"), web}}, {name: "test", families: families, applied: selector{in("test"), web}},
	}, func(name string) (labels.Set, bool) { set, ok := namespaces[name]; return set, ok }, func(string, pod) bool { return false })
	at := func(namespace, name, node, app string, ips ...string) pod {
		p := pod{name: namespace + "/" + name, namespace: namespace, node: node, labels: newLabelSet(map[string]string{"app": app})}
		for _, text := range ips {
			p.ips = append(p.ips, ip(text))
		}
		return p
	}
	pods := []pod{at("a", "web", "n1", "web", "10.0.0.1"), at("a", "db", "n2", "db", "10.0.0.2"), at("a", "six", "n3", "web", "fd00::3")}
	gone := at("a", "gone", "n4", "web", "10.0.0.4")
	other := at("b", "web", "n5", "web", "10.0.0.5")
	for _, p := range append(pods, gone, other) {
		s.owner(p, familyOf(p.ips[0]))
	}
	for _, step := range []struct {
		labels labels.Set
		want   []string
		owner  string
	}{
		{labels.Set{"env": "prod", "more": "x"}, nil, "prod"},
		{labels.Set{"env": "test"}, []string{"n1", "n3"}, "test"},
		{labels.Set{"env": "none"}, []string{"n1", "n3"}, egress.Unselected},
	} {
		namespaces["a"] = step.labels
		if d := cmp.Diff(step.want, s.relabelled("a", pods)); d != "" {
			t.Errorf("labels %v: nodes (-want +got):\n%s", step.labels, d)
		}
		if got, _ := s.owner(gone, ipv4); got != step.owner { // it was gone then, and came back as it was
			t.Errorf("labels %v: a pod that came back is one of %s, want %s", step.labels, got, step.owner)
		}
		if got := s.known["b"][labelFamily{other.labels, ipv4}].owner; got != "prod" {
			t.Errorf("labels %v: the pod of another namespace is known as one of %q", step.labels, got)
		}
	}
	delete(namespaces, "a")
	if got := s.relabelled("a", pods); len(got) != 3 {
		t.Errorf("nodes %v: want all of the pods, whose namespace is not seen", got)
	}
}

// A pod was looked at before its namespace was seen, and another one with its labels after that, before the namespace's
// event: the first has what it had.
func TestThePodsOfANamespaceThatWasNotSeenAreAllLookedAtAgain(t *testing.T) {
	web := labels.Set{"app": "web"}
	seen := false
	s := newSelection([]claimant{{name: "web", families: families, applied: selector{labels.Everything(), labels.SelectorFromSet(web)}}},
		func(string) (labels.Set, bool) { return nil, seen }, func(string, pod) bool { return false })
	early := pod{name: "a/early", namespace: "a", node: "n1", labels: newLabelSet(web), ips: []netip.Addr{ip("10.0.0.1")}}
	late := pod{name: "a/late", namespace: "a", node: "n2", labels: newLabelSet(web), ips: []netip.Addr{ip("10.0.0.2")}}
	if got, _ := s.owner(early, ipv4); got != "" {
		t.Fatalf("not seen: %q", got)
	}
	seen = true
	if got, _ := s.owner(late, ipv4); got != "web" {
		t.Fatalf("seen: %q", got)
	}
	for _, want := range [][]string{{"n1", "n2"}, nil} {
		if got := s.relabelled("a", []pod{early, late}); !slices.Equal(got, want) {
			t.Errorf("nodes %v, want %v", got, want)
		}
	}
}

func TestTheErrorOfASelectorIsTheSameEachTime(t *testing.T) {
	s := &v1beta1.LabelSelector{MatchLabels: map[string]v1beta1.LabelValue{"a b": "x", "c d": "y", "e f": "z"}}
	_, _, first := spec.AppliedTo(v1beta1.AppliedTo{PodSelector: s})
	for range 50 {
		if _, _, err := spec.AppliedTo(v1beta1.AppliedTo{PodSelector: s}); err == nil || err.Error() != first.Error() {
			t.Fatalf("first %v, then %v", first, err)
		}
	}
}

func TestAnIPBelongsToTheNewestPodThatListsIt(t *testing.T) {
	dying, alive := pod{name: "a/z", created: time.Unix(2, 0), ending: true}, pod{name: "a/a", created: time.Unix(1, 0)}
	if got := holder([]pod{dying, alive}).name; got != "a/a" {
		t.Errorf("one is being deleted: got %s", got)
	}
	old, young := pod{name: "a/z", created: time.Unix(1, 0)}, pod{name: "a/a", created: time.Unix(2, 0)}
	if got := holder([]pod{old, young}).name; got != "a/a" {
		t.Errorf("got %s", got)
	}
	if got := holder([]pod{young, old}).name; got != "a/a" {
		t.Errorf("in another order: got %s", got)
	}
}
