package crdsync

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	gocmp "github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// eventsOf returns the Events of an egress in their order, as "type reason note".
func (c *cluster) eventsOf(name string) []string {
	c.Helper()
	return c.eventsAbout(string(c.getEgress(name).UID), "Egress", name)
}

func (c *cluster) eventsAbout(uid, kind, name string) []string {
	c.Helper()
	l, err := c.core.EventsV1().Events(metav1.NamespaceDefault).List(c.Context(), metav1.ListOptions{FieldSelector: "regarding.uid=" + uid})
	if err != nil {
		c.Fatal(err)
	}
	slices.SortFunc(l.Items, func(a, b eventsv1.Event) int { return a.EventTime.Compare(b.EventTime.Time) })
	var out []string
	for _, e := range l.Items {
		if e.Regarding.Kind != kind || e.Regarding.APIVersion != "crd.antrea.io/v1beta1" || e.Regarding.Name != name || e.Series != nil {
			c.Errorf("Event %+v: want one of an %s, and no series", e, kind)
		}
		out = append(out, e.Type+" "+e.Reason+" "+e.Note)
	}
	return out
}

func (c *cluster) wantEvents(name string, want ...string) {
	c.Helper()
	c.eventually(func() error {
		if d := gocmp.Diff(want, c.eventsOf(name)); d != "" {
			return fmt.Errorf("events of %s (-want +got):\n%s", name, d)
		}
		return nil
	})
}

// history follows the status of an egress, and returns a function that waits until it has told of an Event, the last
// one, and says which Events it has to have by then.
func (c *cluster) history(name string) (due func(last string) []string) {
	c.Helper()
	ctx, cancel := context.WithCancel(c.Context())
	c.Cleanup(cancel)
	w, err := c.dyn.Resource(v1beta1.EgressResource).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name, ResourceVersion: "0"})
	if err != nil {
		c.Fatal(err)
	}
	var old eventRecord
	var out []string
	return func(last string) []string {
		c.Helper()
		for late := time.After(deadline); len(out) == 0 || out[len(out)-1] != last; {
			select {
			case e := <-w.ResultChan():
				u, ok := e.Object.(*unstructured.Unstructured)
				if !ok {
					c.Fatalf("watching: %+v", e)
				}
				// no IP has been unassigned for maxUnassigned
				now, warnings, _ := eventRecordOf(readStatus(u), time.Unix(0, 0))
				for _, n := range now.changes(old, warnings) {
					out = append(out, n.kind+" "+n.reason+" "+n.note)
				}
				old = now
			case <-late:
				c.Fatalf("not within %v: a status of which the last Event is %q; it went this way: %q", deadline, last, out)
			}
		}
		return out
	}
}

func (c *cluster) own(address, node string) {
	c.Helper()
	c.put("owners/"+address, egress.Owner{IP: ip(address), Node: node, Why: egress.ReasonClaim})
}

const (
	on  = "Normal IPAssigned 10.10.0.11 is on node "
	off = "Normal IPUnassigned 10.10.0.11 is no longer on node "
)

func testEvents(c *cluster) {
	var o outage
	kube := rest.CopyConfig(c.kube)
	kube.Dial = o.dial
	c.example() // before it runs: pools and egresses come by different watches
	stop := c.run(kube)
	c.own("10.10.0.11", "node-4")
	want := []string{on + "node-4"}
	c.wantEvents("egress-prod-web", want...)
	c.own("10.10.0.11", "node-6")
	want = append(want, off+"node-4", on+"node-6")
	c.wantEvents("egress-prod-web", want...)
	c.patch("Egress", "egress-prod-web", `{"spec":{"bandwidth":{"rate":"1M","burst":"1M"}}}`) // nothing that has an Event
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+"owners/10.10.0.11"); err != nil {
		c.Fatal(err)
	}
	want = append(want, off+"node-6")
	c.wantEvents("egress-prod-web", want...)

	// The API server is down: the IP moves twice, and the status catches up in one step.
	c.own("10.10.0.11", "node-1")
	want = append(want, on+"node-1")
	c.wantEvents("egress-prod-web", want...)
	o.set(true)
	c.own("10.10.0.11", "node-2")
	time.Sleep(200 * time.Millisecond) // long enough for tries that fail
	c.own("10.10.0.11", "node-3")
	o.set(false)
	c.wantStatus("egress-prod-web", "10.10.0.11 node-3 True Allocated True Assigned")
	c.wantEvents("egress-prod-web", append(want, off+"node-1", on+"node-3")...)
	want = append(want, off+"node-1", on+"node-3")

	// A restart makes no Event; what happened meanwhile has one.
	stop()
	stop = c.run(c.kube)
	c.own("10.10.0.12", "node-6")
	// everything has been looked at
	c.wantEvents("egress-staging-web", "Normal IPAssigned 10.10.0.12 is on node node-6")
	c.wantEvents("egress-prod-web", want...)
	stop()
	c.own("10.10.0.11", "node-4")
	c.run(c.kube)
	c.wantEvents("egress-prod-web", append(want, off+"node-3", on+"node-4")...)
}

func testEventsOfLeaders(c *cluster) {
	c.example()
	due := c.history("egress-prod-web")
	stop := c.run(c.kube)
	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	const moves = 12
	for i := range moves {
		next := c.run(c.kube)
		c.wantCandidates(2)
		node := fmt.Sprintf("node-%d", i)
		c.own("10.10.0.11", node)
		time.Sleep(time.Duration(i/2) * time.Millisecond) // at different points of the write
		if i%2 == 0 {                                     // handed over by a process that ends
			stop()
			stop = next
		} else { // the other one leads, and the former leader does not know yet
			c.deposeLeader()
			c.wantStatus("egress-prod-web", "10.10.0.11 "+node+" True Allocated True Assigned")
			stop()
			stop = next
		}
		c.wantStatus("egress-prod-web", "10.10.0.11 "+node+" True Allocated True Assigned")
	}
	want := due(fmt.Sprint(on, "node-", moves-1))
	if len(want) != 2*moves-1 {
		c.Errorf("the status went this way: %q", want)
	}
	c.wantEvents("egress-prod-web", want...)
}

// deposeLeader removes the leader's key of the election. A leader finds out when it writes to etcd.
func (c *cluster) deposeLeader() {
	c.Helper()
	r, err := c.etcd.Client().Get(c.Context(), store.DefaultPrefix+"elections/", clientv3.WithFirstCreate()...)
	if err == nil && len(r.Kvs) == 1 {
		_, err = c.etcd.Client().Delete(c.Context(), string(r.Kvs[0].Key))
	}
	if err != nil || len(r.Kvs) != 1 {
		c.Fatal(r, err)
	}
}

// lossy loses answers that the API server gave: those to every third write of a status or an Event.
type lossy struct {
	http.RoundTripper
	writes atomic.Int64
}

func (f *lossy) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := f.RoundTripper.RoundTrip(r)
	if write := strings.HasSuffix(r.URL.Path, "/status") || r.Method == http.MethodPost; err == nil && write && f.writes.Add(1)%3 == 1 {
		resp.Body.Close()
		return nil, errors.New("the answer got lost")
	}
	return resp, err
}

func testLostAnswers(c *cluster) {
	kube := rest.CopyConfig(c.kube)
	kube.Wrap(func(next http.RoundTripper) http.RoundTripper { return &lossy{RoundTripper: next} })
	c.example()
	due := c.history("egress-prod-web")
	c.run(kube)
	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	for i := range 10 {
		node := fmt.Sprintf("node-%d", i)
		c.own("10.10.0.11", node)
		c.wantStatus("egress-prod-web", "10.10.0.11 "+node+" True Allocated True Assigned")
	}
	want := due(on + "node-9")
	if len(want) != 19 {
		c.Errorf("the status went this way: %q", want)
	}
	c.wantEvents("egress-prod-web", want...)
}

func testWarnings(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: a}, spec: {externalIPPool: p, appliedTo: {podSelector: {}}}}`)
	c.wantEvents("a", "Warning AllocationError pool p does not exist")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [{start: 10.10.0.11, end: 10.10.0.11}], nodeSelector: {}}}`)
	c.wantStatus("a", "10.10.0.11  True Allocated False AssignmentError")
	c.pod("prod", "x", "node-1", "10.244.1.1", "web")
	c.wantMembers("a", "prod/x=10.244.1.1")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: b},
  spec: {externalIPPool: p, egressIP: 10.10.0.11, appliedTo: {podSelector: {}}}}`)
	const conflict = "Warning Conflict 10.10.0.11 is in use by egress a; pod prod/x is selected by egress a too, which comes first"
	want := []string{"Warning AllocationError 10.10.0.11 is in use by egress a", conflict}
	c.wantEvents("b", want...)
	c.pod("prod", "y", "node-1", "10.244.1.2", "web")
	c.wantCondition("b", "Conflict DuplicateIP: 10.10.0.11 is in use by egress a; 2 pods, such as prod/x, are selected by egress a too, which comes first")
	c.own("10.10.0.11", "node-1")
	// "a" has it, and the conflict is not its own
	c.wantEvents("a", "Warning AllocationError pool p does not exist", on+"node-1")
	c.wantEvents("b", want...)

	// Another cause has an Event, too, and the same one has no second.
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: c}, spec: {externalIPPool: late, egressIP: 10.10.9.9, appliedTo: {}}}`)
	want = []string{"Warning AllocationError pool late does not exist"}
	c.wantEvents("c", want...)
	c.pool("late", "10.10.8.1-10.10.8.9")
	want = append(want, "Warning AllocationError egressIP 10.10.9.9 is not an address of pool late: want one of 10.10.8.1-10.10.8.9")
	c.wantEvents("c", want...)
	c.patch("Egress", "c", `{"spec":{"bandwidth":{"rate":"1M","burst":"1M"}}}`)
	c.wantCondition("c", "IPAllocated AllocationError: egressIP 10.10.9.9 is not an address of pool late: want one of 10.10.8.1-10.10.8.9")
	c.wantEvents("c", want...)
}

// testBothFamilies: each IP of an egress comes and goes by itself.
func testBothFamilies(c *cluster) {
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: four}, spec: {ipRanges: [{start: 10.10.0.11, end: 10.10.0.11}], nodeSelector: {}}}`)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: six}, spec: {ipRanges: [{start: "fd00::11", end: "fd00::11"}], nodeSelector: {}}}`)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: dual}, spec: {externalIPPools: [four, six], appliedTo: {podSelector: {}}}}`)
	c.run(c.kube)
	const on6, off6 = "Normal IPAssigned fd00::11 is on node ", "Normal IPUnassigned fd00::11 is no longer on node "
	addresses := func(want ...v1beta1.EgressAddress) {
		c.Helper()
		c.eventually(func() error {
			if d := gocmp.Diff(want, c.getEgress("dual").Status.Addresses); d != "" {
				return fmt.Errorf("addresses (-want +got):\n%s", d)
			}
			return nil
		})
	}
	c.own("fd00::11", "node-1")
	c.wantEvents("dual", on6+"node-1")
	addresses(v1beta1.EgressAddress{IP: "10.10.0.11"}, v1beta1.EgressAddress{IP: "fd00::11", Node: "node-1"})
	c.own("10.10.0.11", "node-1")
	c.wantEvents("dual", on6+"node-1", on+"node-1")
	c.own("fd00::11", "node-2")
	want := []string{on6 + "node-1", on + "node-1", off6 + "node-1", on6 + "node-2"}
	c.wantEvents("dual", want...)
	addresses(v1beta1.EgressAddress{IP: "10.10.0.11", Node: "node-1"}, v1beta1.EgressAddress{IP: "fd00::11", Node: "node-2"})
	uid := string(c.getEgress("dual").UID)
	c.remove("Egress", "dual")
	want = append(want, off+"node-1", off6+"node-2")
	c.eventually(func() error {
		if d := gocmp.Diff(want, c.eventsAbout(uid, "Egress", "dual")); d != "" {
			return fmt.Errorf("events (-want +got):\n%s", d)
		}
		return nil
	})
}

// testEventsOfTheDead: an egress is deleted, and made anew, while nobody leads.
func testEventsOfTheDead(c *cluster) {
	c.example()
	stop := c.run(c.kube)
	c.own("10.10.0.11", "node-4")
	c.own("10.10.0.12", "node-4")
	c.wantEvents("egress-prod-web", on+"node-4")
	c.wantEvents("egress-staging-web", "Normal IPAssigned 10.10.0.12 is on node node-4")
	stop()
	old := map[string]string{}
	for _, name := range []string{"egress-prod-web", "egress-staging-web"} {
		old[name] = string(c.getEgress(name).UID)
		c.remove("Egress", name)
	}
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: egress-prod-web}, spec: {externalIPPool: external-ip-pool, appliedTo: {podSelector: {}}}}`)
	for range 2 { // the second time it has had its Event
		stop = c.run(c.kube)
		c.wantEvents("egress-prod-web", on+"node-4")
		c.eventually(func() error {
			got := [][]string{c.eventsAbout(old["egress-prod-web"], "Egress", "egress-prod-web"), c.eventsAbout(old["egress-staging-web"], "Egress", "egress-staging-web")}
			want := [][]string{{on + "node-4", off + "node-4"},
				{"Normal IPAssigned 10.10.0.12 is on node node-4", "Normal IPUnassigned 10.10.0.12 is no longer on node node-4"}}
			if d := gocmp.Diff(want, got); d != "" {
				return fmt.Errorf("events (-want +got):\n%s", d)
			}
			return nil
		})
		stop()
	}
}

// mute takes a status and lets nothing be said: as if the leader were killed between the two.
type mute struct{ http.RoundTripper }

func (m mute) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/events") {
		return nil, errors.New("the leader is dead")
	}
	return m.RoundTripper.RoundTrip(r)
}

func testKilledLeader(c *cluster) {
	kube := rest.CopyConfig(c.kube)
	kube.Wrap(func(next http.RoundTripper) http.RoundTripper { return mute{next} })
	c.example()
	stop := c.run(kube)
	c.own("10.10.0.11", "node-4")
	c.wantStatus("egress-prod-web", "10.10.0.11 node-4 True Allocated True Assigned")
	stop()
	c.wantEvents("egress-prod-web")
	c.own("10.10.0.11", "node-6") // is not what the status says when the next one comes
	c.run(c.kube)
	c.wantEvents("egress-prod-web", on+"node-4", off+"node-4", on+"node-6")
}

// testPoolWarning: a pool has no conditions.
func testPoolWarning(c *cluster) {
	stop := c.run(c.kube)
	pool := func(name, ranges string) string {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: %s}, spec: {ipRanges: [%s], nodeSelector: {}}}`, name, ranges))
		u, err := c.dyn.Resource(v1beta1.PoolResource).Get(c.Context(), name, metav1.GetOptions{})
		if err != nil {
			c.Fatal(err)
		}
		return string(u.GetUID())
	}
	want := func(uid, name string, want ...string) {
		c.Helper()
		c.eventually(func() error {
			if d := gocmp.Diff(want, c.eventsAbout(uid, "ExternalIPPool", name)); d != "" {
				return fmt.Errorf("events of pool %s (-want +got):\n%s", name, d)
			}
			return nil
		})
	}
	elder := pool("a", "{start: 10.10.0.1, end: 10.10.0.3}")
	younger := pool("b", "{start: 10.10.0.2, end: 10.10.0.4}")
	const overlaps = "Warning InvalidPool ipRanges: 10.10.0.2-10.10.0.4 overlaps with 10.10.0.1-10.10.0.3 of pool a: want each address in one pool"
	want(younger, "b", overlaps)
	want(elder, "a")
	stop()
	c.run(c.kube)
	c.patch("ExternalIPPool", "b", `{"spec":{"ipRanges":[{"start":"10.10.0.4","end":"10.10.0.4"}]}}`)
	c.wantUsage("b", 1, 0)
	want(younger, "b", overlaps)
	c.patch("ExternalIPPool", "b", `{"spec":{"ipRanges":[{"start":"10.10.0.3","end":"10.10.0.4"}]}}`)
	const again = "Warning InvalidPool ipRanges: 10.10.0.3-10.10.0.4 overlaps with 10.10.0.1-10.10.0.3 of pool a: want each address in one pool"
	want(younger, "b", overlaps, again)
	c.patch("ExternalIPPool", "b", `{"spec":{"ipRanges":[{"start":"10.10.0.1","end":"10.10.0.4"}]}}`) // at fault in another way
	want(younger, "b", overlaps, again, strings.Replace(again, "10.10.0.3-10.10.0.4", "10.10.0.1-10.10.0.4", 1))
}

func TestAnIPWithoutANodeIsAWarningAfterAWhile(t *testing.T) {
	start := time.Unix(100, 0)
	status := egressStatus(v1beta1.EgressStatus{}, verdict{addresses: []egress.Address{{IP: ip("10.0.0.9"), ID: 2}}}, clusterState{}, start)
	for after, want := range map[time.Duration][]string{0: nil, maxUnassigned - time.Second: nil, maxUnassigned: {"AssignmentError"}} {
		a, warnings, later := eventRecordOf(status, start.Add(after))
		if d := gocmp.Diff(want, a.Warnings); d != "" || later != max(maxUnassigned-after, 0) {
			t.Errorf("after %v, to look again after %v (-want +got):\n%s", after, later, d)
		}
		for _, n := range a.changes(eventRecord{}, warnings) {
			if n.note != "no node with a live agent has 10.0.0.9 on an interface" {
				t.Errorf("note %q", n.note)
			}
		}
	}
	failed := egressStatus(v1beta1.EgressStatus{}, verdict{err: errors.New("no pool")}, clusterState{}, start)
	if a, _, _ := eventRecordOf(failed, start.Add(maxUnassigned)); !slices.Equal(a.Warnings, []string{"AllocationError: no pool"}) {
		t.Errorf("an egress without an IP is warned of for %q", a.Warnings)
	}
}

func TestEventsOfLongNamesAreWithinBounds(t *testing.T) {
	d := eventRecorder{instance: strings.Repeat("i", 200)}
	about := corev1.ObjectReference{Name: strings.Repeat("a.", 126) + "a", UID: "0"}
	n := eventText{corev1.EventTypeWarning, "AllocationError", "Allocate", "x" + strings.Repeat("é", 1000)}
	e := d.event(about, n, "1", 0)
	if len(e.Name) > 253 || strings.Contains(e.Name, "..") || len(e.Note) > 1024 || !utf8.ValidString(e.Note) || len(e.ReportingInstance) != 128 {
		t.Errorf("Event %+v", e)
	}
	if o := d.event(about, n, "2", 0); o.Name == e.Name {
		t.Errorf("two changes have Events of one name, %s", o.Name)
	}
}
