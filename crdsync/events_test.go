package crdsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	gocmp "github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// told returns the Events of an egress in their order, as "type reason note".
func (c *cluster) told(name string) []string {
	c.Helper()
	uid := c.getEgress(name).UID
	l, err := c.core.EventsV1().Events(metav1.NamespaceDefault).List(c.Context(), metav1.ListOptions{FieldSelector: "regarding.uid=" + string(uid)})
	if err != nil {
		c.Fatal(err)
	}
	slices.SortFunc(l.Items, func(a, b eventsv1.Event) int {
		x, _ := strconv.ParseInt(a.Regarding.ResourceVersion, 10, 64) // 0 fails the test below
		y, _ := strconv.ParseInt(b.Regarding.ResourceVersion, 10, 64)
		return cmp.Or(cmp.Compare(x, y), cmp.Compare(a.Name, b.Name))
	})
	var out []string
	for _, e := range l.Items {
		if e.Regarding.Kind != "Egress" || e.Regarding.APIVersion != "crd.antrea.io/v1beta1" || e.Regarding.Name != name || e.Series != nil {
			c.Errorf("Event %+v: want one of an Egress, and no series", e)
		}
		out = append(out, e.Type+" "+e.Reason+" "+e.Note)
	}
	return out
}

func (c *cluster) wantTold(name string, want ...string) {
	c.Helper()
	c.eventually(func() error {
		if d := gocmp.Diff(want, c.told(name)); d != "" {
			return fmt.Errorf("events of %s (-want +got):\n%s", name, d)
		}
		return nil
	})
}

// history follows the status of an egress, and returns a function that says which Events it has to have by now.
func (c *cluster) history(name string) (due func() []string) {
	c.Helper()
	ctx, cancel := context.WithCancel(c.Context())
	c.Cleanup(cancel)
	w, err := c.dyn.Resource(v1beta1.EgressResource).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name, ResourceVersion: "0"})
	if err != nil {
		c.Fatal(err)
	}
	var status v1beta1.EgressStatus
	var out []string
	return func() []string {
		for idle := time.After(100 * time.Millisecond); ; {
			select {
			case e := <-w.ResultChan():
				u, ok := e.Object.(*unstructured.Unstructured)
				if !ok {
					c.Fatalf("watching: %+v", e)
				}
				now := readStatus(u)
				for _, n := range newsOf(status, now) {
					out = append(out, n.kind+" "+n.reason+" "+n.note)
				}
				status = now
			case <-idle:
				return out
			}
		}
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
	stop := c.run(kube)
	c.example()
	c.own("10.10.0.11", "node-4")
	want := []string{on + "node-4"}
	c.wantTold("egress-prod-web", want...)
	c.own("10.10.0.11", "node-6")
	want = append(want, off+"node-4", on+"node-6")
	c.wantTold("egress-prod-web", want...)
	c.patch("Egress", "egress-prod-web", `{"spec":{"bandwidth":{"rate":"1M","burst":"1M"}}}`) // nothing that is told
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+"owners/10.10.0.11"); err != nil {
		c.Fatal(err)
	}
	want = append(want, off+"node-6")
	c.wantTold("egress-prod-web", want...)

	// The API server is down: the IP moves twice, and the status catches up in one step.
	c.own("10.10.0.11", "node-1")
	want = append(want, on+"node-1")
	c.wantTold("egress-prod-web", want...)
	o.set(true)
	c.own("10.10.0.11", "node-2")
	time.Sleep(200 * time.Millisecond) // long enough for tries that fail
	c.own("10.10.0.11", "node-3")
	o.set(false)
	c.wantStatus("egress-prod-web", "10.10.0.11 node-3 True Allocated True Assigned")
	c.wantTold("egress-prod-web", append(want, off+"node-1", on+"node-3")...)
	want = append(want, off+"node-1", on+"node-3")

	// A restart tells nothing; what happened meanwhile is told once.
	stop()
	stop = c.run(c.kube)
	c.own("10.10.0.12", "node-6")
	c.wantTold("egress-staging-web", "Normal IPAssigned 10.10.0.12 is on node node-6") // everything has been looked at
	c.wantTold("egress-prod-web", want...)
	stop()
	c.own("10.10.0.11", "node-4")
	c.run(c.kube)
	c.wantTold("egress-prod-web", append(want, off+"node-3", on+"node-4")...)
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
	want := due()
	if len(want) != 2*moves-1 || want[2*moves-2] != fmt.Sprint(on, "node-", moves-1) {
		c.Errorf("the status went this way: %q", want)
	}
	c.wantTold("egress-prod-web", want...)
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

// forgetful loses answers that the API server gave: those to every third write of a status or an Event.
type forgetful struct {
	http.RoundTripper
	writes atomic.Int64
}

func (f *forgetful) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := f.RoundTripper.RoundTrip(r)
	if write := strings.HasSuffix(r.URL.Path, "/status") || r.Method == http.MethodPost; err == nil && write && f.writes.Add(1)%3 == 1 {
		resp.Body.Close()
		return nil, errors.New("the answer got lost")
	}
	return resp, err
}

func testLostAnswers(c *cluster) {
	kube := rest.CopyConfig(c.kube)
	kube.Wrap(func(next http.RoundTripper) http.RoundTripper { return &forgetful{RoundTripper: next} })
	c.example()
	due := c.history("egress-prod-web")
	c.run(kube)
	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	for i := range 10 {
		node := fmt.Sprintf("node-%d", i)
		c.own("10.10.0.11", node)
		c.wantStatus("egress-prod-web", "10.10.0.11 "+node+" True Allocated True Assigned")
	}
	want := due()
	if len(want) != 19 {
		c.Errorf("the status went this way: %q", want)
	}
	c.wantTold("egress-prod-web", want...)
}

func testWarnings(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: a}, spec: {externalIPPool: p, appliedTo: {podSelector: {}}}}`)
	c.wantTold("a", "Warning AllocationError pool p does not exist")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [{start: 10.10.0.11, end: 10.10.0.11}], nodeSelector: {}}}`)
	c.wantStatus("a", "10.10.0.11  True Allocated False AssignmentError")
	c.pod("prod", "x", "node-1", "10.244.1.1", "web")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: b},
  spec: {externalIPPool: p, egressIP: 10.10.0.11, appliedTo: {podSelector: {}}}}`)
	const conflict = "Warning Conflict 10.10.0.11 is in use by egress a; pod prod/x is selected by egress a too, which comes first"
	want := []string{"Warning AllocationError 10.10.0.11 is in use by egress a", conflict}
	c.wantTold("b", want...)
	c.pod("prod", "y", "node-1", "10.244.1.2", "web")
	c.wantCondition("b", "Conflict DuplicateIP: 10.10.0.11 is in use by egress a; 2 pods, such as prod/x, are selected by egress a too, which comes first")
	c.own("10.10.0.11", "node-1")
	c.wantTold("a", "Warning AllocationError pool p does not exist", on+"node-1") // "a" has it, and the conflict is not its own
	c.wantTold("b", want...)
}

func TestEventsOfLongNamesAreWithinBounds(t *testing.T) {
	object := func(version string, status v1beta1.EgressStatus) *unstructured.Unstructured {
		u := &unstructured.Unstructured{Object: map[string]any{}}
		u.SetName(strings.Repeat("a.", 126) + "a")
		u.SetResourceVersion(version)
		conditions := []any{}
		for _, c := range status.Conditions {
			conditions = append(conditions, map[string]any{"type": string(c.Type), "status": string(c.Status), "message": c.Message})
		}
		u.Object["status"] = map[string]any{"conditions": conditions}
		return u
	}
	failed := v1beta1.EgressStatus{Conditions: []v1beta1.EgressCondition{
		{Type: v1beta1.IPAllocated, Status: metav1.ConditionFalse, Message: "x" + strings.Repeat("é", 1000)},
	}}
	events := eventsOf(object("1", v1beta1.EgressStatus{}), object("18446744073709551615", failed), strings.Repeat("i", 200))
	if len(events) != 1 {
		t.Fatalf("%d events", len(events))
	}
	e := events[0]
	if len(e.Name) > 253 || strings.Contains(e.Name, "..") || len(e.Note) > 1024 || !utf8.ValidString(e.Note) || len(e.ReportingInstance) != 128 {
		t.Errorf("Event %+v", e)
	}
}
