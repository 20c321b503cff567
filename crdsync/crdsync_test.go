package crdsync

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/store"
)

// TestAgainstARealAPI holds all tests that need an API server: it takes seconds to start, so they share one.
func TestAgainstARealAPI(t *testing.T) {
	kube := kubetest.New(t)
	applyRBAC(t, kube)
	for name, test := range map[string]func(*cluster){
		"the guide's example reaches etcd and the status":   testExample,
		"Service CIDRs reach etcd":                          testServiceCIDRs,
		"a record that etcd refuses holds up no other":      testTooLarge,
		"a leader that alone is cut off resigns":            testPartitioned,
		"informers read no list out of a cache":             testLatest,
		"heartbeats of nodes cause no pass":                 testHeartbeats,
		"pods outside of podCIDRs reach etcd":               testRanges,
		"members follow their pods":                         testMembers,
		"an object that cannot be read stops no other":      testMalformed,
		"objects that are older than the schema":            testSlipped,
		"what is wrong with a pool shows in its egresses":   testPoolFaults,
		"the webhook refuses what is wrong":                 testWebhook,
		"a restart changes nothing":                         testRestart,
		"an empty etcd gets the addresses of the statuses":  testWipedEtcd,
		"a released address goes to whoever waits":          testRelease,
		"an API server that is down deletes nothing":        testOutage,
		"a replica takes over":                              testTakeOver,
		"a leadership that is lost is won again":            testLostLeadership,
		"a replica that saw no change undoes none":          testStaleReplica,
		"a change that is taken back at once is mirrored":   testTakenBack,
		"records that were spoiled are mended":              testSpoiled,
		"a change of which there was no word is mirrored":   testResync,
		"more changes than fit one transaction":             testMany,
		"of two egresses that collide the loser says so":    testConflict,
		"every change of a status has one Event":            testEvents,
		"a change has one Event, whoever leads":             testEventsOfLeaders,
		"a change whose answer is lost has one Event":       testLostAnswers,
		"what a person must mend has a Warning":             testWarnings,
		"a pool that is faulty has a Warning":               testPoolWarning,
		"each IP of an egress has Events":                   testBothFamilies,
		"a deleted egress has last Events":                  testEventsOfTheDead,
		"changes under a killed leader have Events":         testKilledLeader,
		"a node that is at fault is named":                  testDegraded,
		"whatever a status depends on is looked at at once": testCauses,
		"what a person reads reads well":                    testReading,
		"the usage of a pool is right within a second":      testUsage,
		"an etcd that is full has Events and gets space":    testFullEtcd,
	} {
		t.Run(name, func(t *testing.T) { test(newCluster(t, kube)) })
	}
}

// TestCrdsyncWorksUnderItsRole runs what writes each kind of record where etcd lets crdsync write nothing else.
func TestCrdsyncWorksUnderItsRole(t *testing.T) {
	kube := kubetest.New(t)
	applyRBAC(t, kube)
	for name, test := range map[string]func(*cluster){
		"the guide's example reaches etcd and the status": testExample,
		"Service CIDRs reach etcd":                        testServiceCIDRs,
		"members follow their pods":                       testMembers,
		"a released address goes to whoever waits":        testRelease,
		"more changes than fit one transaction":           testMany,
	} {
		t.Run(name, func(t *testing.T) { test(newCluster(t, kube).underItsRole()) })
	}
}

func testExample(c *cluster) {
	c.node("node-4", "192.0.2.4")
	c.node("node-6", "192.0.2.6")
	c.pod("prod", "web", "node-4", "10.244.4.1", "web")
	c.pod("prod", "db", "node-4", "10.244.4.2", "db")
	c.pod("staging", "web", "node-6", "10.244.6.1", "web")
	c.run(c.kube)
	c.example()
	c.wantRecords("members/*/*/*", map[string]string{
		"members/by-node/node-4/egress-prod-web":      "prod/web=10.244.4.1",
		"members/by-egress/egress-prod-web/node-4":    "prod/web=10.244.4.1",
		"members/by-node/node-4/-":                    "prod/db=10.244.4.2",
		"members/by-node/node-6/egress-staging-web":   "staging/web=10.244.6.1",
		"members/by-egress/egress-staging-web/node-6": "staging/web=10.244.6.1",
	})
	c.wantRecords("egresses/*", map[string]string{"egresses/egress-prod-web": "10.10.0.11/1", "egresses/egress-staging-web": "10.10.0.12/2"})
	c.wantRecords("allocations/*", map[string]string{
		"allocations/10.10.0.11": "external-ip-pool/1 egress-prod-web", "allocations/10.10.0.12": "external-ip-pool/2 egress-staging-web",
	})
	c.wantRecords("ids/*", map[string]string{"ids/1": `{"id":1,"ip":"10.10.0.11"}`, "ids/2": `{"id":2,"ip":"10.10.0.12"}`})
	c.wantRecords("nodes/*", map[string]string{"nodes/node-4": "1 192.0.2.4", "nodes/node-6": "2 192.0.2.6"})

	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	c.put("owners/10.10.0.11", egress.Owner{IP: ip("10.10.0.11"), Node: "node-4", Why: egress.ReasonClaim})
	c.wantStatus("egress-prod-web", "10.10.0.11 node-4 True Allocated True Assigned")
	c.wantUsage("external-ip-pool", 10, 2)
	got := c.printed(v1beta1.EgressResource.Resource)
	if want := "Name EgressIP Age Node | egress-prod-web 10.10.0.11 AGE node-4 | egress-staging-web 10.10.0.12 AGE "; got != want {
		c.Errorf("kubectl get egress: got %q, want %q", got, want)
	}
}

func testServiceCIDRs(c *cluster) {
	const standard = `{"name":"kubernetes","cidrs":["10.0.0.0/24"]}` // as the API server was started
	stop := c.run(c.kube)
	c.wantRecords("services/*", map[string]string{"services/kubernetes": standard})
	api := c.core.NetworkingV1().ServiceCIDRs()
	more := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "more"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.1.0.0/16", "fd01::/112"}}}
	if _, err := api.Create(c.Context(), more, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
	want := map[string]string{"services/kubernetes": standard, "services/more": `{"name":"more","cidrs":["10.1.0.0/16","fd01::/112"]}`}
	c.wantRecords("services/*", want)

	// Where they must not be read any more, what is known of them stands, and all else goes on.
	stop()
	as := rest.CopyConfig(c.kube)
	as.Impersonate.UserName = "crdsync-without-services"
	allow(c, as.Impersonate.UserName)
	stop = c.run(as)
	c.node("node-7", "192.0.2.7")
	c.wantRecords("nodes/*", map[string]string{"nodes/node-7": "1 192.0.2.7"})
	c.wantRecords("services/*", want)
	stop()

	c.run(c.kube)
	if err := api.Delete(c.Context(), "more", metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.wantRecords("services/*", map[string]string{"services/kubernetes": standard})
}

// allow lets a user read all that crdsync reads but ServiceCIDRs.
func allow(c *cluster, user string) {
	c.Helper()
	rules := []rbacv1.PolicyRule{
		{APIGroups: []string{"crd.antrea.io"}, Resources: []string{"*"}, Verbs: []string{"*"}},
		{APIGroups: []string{""}, Resources: []string{"namespaces", "nodes", "pods"}, Verbs: []string{"get", "list", "watch"}},
		{APIGroups: []string{"events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"create"}},
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: user}, Rules: rules}
	binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}}}
	_, err1 := c.core.RbacV1().ClusterRoles().Create(c.Context(), role, metav1.CreateOptions{})
	_, err2 := c.core.RbacV1().ClusterRoleBindings().Create(c.Context(), binding, metav1.CreateOptions{})
	if err := errors.Join(err1, err2); err != nil {
		c.Fatal(err)
	}
}

// printed returns the table that kubectl prints, ages left out.
func (c *cluster) printed(resource string) string {
	c.Helper()
	b, err := c.core.RESTClient().Get().AbsPath("/apis/crd.antrea.io/v1beta1", resource).
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").Do(c.Context()).Raw()
	if err != nil {
		c.Fatal(err)
	}
	var table metav1.Table
	if err := json.Unmarshal(b, &table); err != nil {
		c.Fatal(err)
	}
	var head []string // those of -o wide come after these
	for _, column := range table.ColumnDefinitions {
		if column.Priority == 0 {
			head = append(head, column.Name)
		}
	}
	lines := []string{strings.Join(head, " ")}
	for _, row := range table.Rows {
		row.Cells[2] = "AGE"
		lines = append(lines, strings.TrimSuffix(fmt.Sprintln(row.Cells[:len(head)]...), "\n"))
	}
	return strings.ReplaceAll(strings.Join(lines, " | "), "<nil>", "")
}

func testMembers(c *cluster) {
	c.run(c.kube)
	c.example()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.pod("prod", "b", "node-1", "10.244.1.2", "web")
	member := func(pods string) {
		c.Helper()
		want := map[string]string{}
		if pods != "" {
			want["members/by-egress/egress-prod-web/node-1"] = pods
		}
		c.wantRecords("members/by-egress/*/*", want)
	}
	member("prod/a=10.244.1.1 prod/b=10.244.1.2")
	c.patchPod("prod", "a", `{"metadata":{"labels":{"app":"db"}}}`)
	member("prod/b=10.244.1.2")
	c.wantRecords("members/by-node/node-1/*", map[string]string{
		"members/by-node/node-1/egress-prod-web": "prod/b=10.244.1.2", "members/by-node/node-1/-": "prod/a=10.244.1.1",
	})
	c.patchPod("prod", "a", `{"metadata":{"labels":{"app":"web"}}}`)
	member("prod/a=10.244.1.1 prod/b=10.244.1.2")

	c.deletePod("prod", "a", 30) // no kubelet ends it: it may still send
	c.pod("prod", "c", "node-1", "10.244.1.3", "web")
	member("prod/a=10.244.1.1 prod/b=10.244.1.2 prod/c=10.244.1.3")
	c.patchPod("prod", "a", `{"status":{"phase":"Failed"}}`, "status")
	member("prod/b=10.244.1.2 prod/c=10.244.1.3")

	c.deletePod("prod", "b", 30)
	c.pod("prod", "z", "node-2", "10.244.1.2", "web") // the IP of b, which is on its way out
	c.wantRecords("members/by-egress/*/*", map[string]string{
		"members/by-egress/egress-prod-web/node-1": "prod/c=10.244.1.3", "members/by-egress/egress-prod-web/node-2": "prod/z=10.244.1.2",
	})
	c.deletePod("prod", "z", 0)
	member("prod/b=10.244.1.2 prod/c=10.244.1.3")

	c.patch("Egress", "egress-prod-web", `{"spec":{"appliedTo":{"podSelector":{"matchLabels":{"app":"none"}}}}}`)
	member("")
	c.remove("Egress", "egress-prod-web")
	c.remove("Egress", "egress-staging-web")
	c.remove("ExternalIPPool", "external-ip-pool")
	for _, pattern := range []string{"[aei]*/*", "pools/*"} {
		c.wantRecords(pattern, map[string]string{})
	} // allocations, egresses, ids, pools
}

func testMalformed(c *cluster) {
	c.loosen()
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: a-broken}, spec: {egressIP: here, externalIPPool: external-ip-pool,
  appliedTo: {podSelector: {matchExpressions: [{key: app, operator: Near}]}}}}`)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: a-broken}, spec: {ipRanges: [{cidr: here}]}}`)
	c.example()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantRecords("egresses/*", map[string]string{
		"egresses/a-broken": "", "egresses/egress-prod-web": "10.10.0.11/1", "egresses/egress-staging-web": "10.10.0.12/2",
	})
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1"})
	c.wantStatus("a-broken", "  False AllocationError False AssignmentError")

	// What is broken later keeps what it had.
	c.patch("Egress", "egress-prod-web", `{"spec":{"egressIP":"here","appliedTo":{"podSelector":{"matchExpressions":[{"key":"app","operator":"Near"}]}}}}`)
	c.patch("ExternalIPPool", "external-ip-pool", `{"spec":{"ipRanges":[{"cidr":"here"}]}}`)
	c.wantStatus("egress-prod-web", "10.10.0.11  False AllocationError False AssignmentError")
	c.wantRecords("allocations/*", map[string]string{
		"allocations/10.10.0.11": "external-ip-pool/1 egress-prod-web", "allocations/10.10.0.12": "external-ip-pool/2 egress-staging-web",
	})
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1"})
}

func testRestart(c *cluster) {
	stop := c.run(c.kube)
	c.node("node-1", "192.0.2.1")
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.pod("prod", "b", "node-1", "10.244.1.2", "db")
	c.example()
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: static}, spec: {egressIP: 192.0.2.1, appliedTo: {}}}`)
	c.wantStatus("static", "192.0.2.1  True Allocated False AssignmentError")
	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	c.wantStatus("egress-staging-web", "10.10.0.12  True Allocated False AssignmentError")
	c.wantUsage("external-ip-pool", 10, 2)
	c.wantRecords("members/by-node/node-1/*", map[string]string{
		"members/by-node/node-1/egress-prod-web": "prod/a=10.244.1.1", "members/by-node/node-1/-": "prod/b=10.244.1.2",
	})
	stop()
	_, before := c.records()
	objects := c.versions()
	// That the next crdsync has done its work shows by the members of a pod that changed meanwhile.
	c.patchPod("prod", "b", `{"metadata":{"labels":{"app":"web"}}}`)
	c.run(c.kube)
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1 prod/b=10.244.1.2"})
	_, after := c.records()
	for _, revisions := range []map[string]int64{before, after} {
		maps.DeleteFunc(revisions, func(key string, _ int64) bool { return strings.HasPrefix(key, "members/") })
	}
	if d := cmp.Diff(before, after); d != "" {
		c.Errorf("mod revisions (-before +after):\n%s", d)
	}
	if d := cmp.Diff(objects, c.versions()); d != "" {
		c.Errorf("resource versions (-before +after):\n%s", d)
	}
}

// versions returns the resource versions of all egresses and pools.
func (c *cluster) versions() map[string]string {
	c.Helper()
	out := map[string]string{}
	for _, r := range []schema.GroupVersionResource{v1beta1.EgressResource, v1beta1.PoolResource} {
		l, err := c.dyn.Resource(r).List(c.Context(), metav1.ListOptions{})
		if err != nil {
			c.Fatal(err)
		}
		for _, u := range l.Items {
			out[r.Resource+"/"+u.GetName()] = u.GetResourceVersion()
		}
	}
	return out
}

func testWipedEtcd(c *cluster) {
	stop := c.run(c.kube)
	c.example()
	c.wantStatus("egress-staging-web", "10.10.0.12  True Allocated False AssignmentError")
	c.remove("Egress", "egress-prod-web")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.12": "external-ip-pool/2 egress-staging-web"})
	stop()
	wiped := connect(c.T, c.kube)
	wiped.run(c.kube)
	wiped.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.12": "external-ip-pool/1 egress-staging-web"})
}

func testRelease(c *cluster) {
	c.run(c.kube)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: one},
  spec: {ipRanges: [{start: 10.10.0.11, end: 10.10.0.11}], nodeSelector: {}}}`)
	egress := func(name string) {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s},
  spec: {externalIPPool: one, appliedTo: {podSelector: {}}}}`, name))
	}
	egress("first")
	c.wantStatus("first", "10.10.0.11  True Allocated False AssignmentError")
	egress("second")
	c.wantStatus("second", "  False AllocationError False AssignmentError")
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/first/node-1": "prod/a=10.244.1.1"})
	c.remove("Egress", "first")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.11": "one/2 second"})
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/second/node-1": "prod/a=10.244.1.1"})
	c.wantStatus("second", "10.10.0.11  True Allocated False AssignmentError")
}

func testOutage(c *cluster) {
	var o outage
	kube := rest.CopyConfig(c.kube)
	kube.Dial = o.dial
	c.run(kube)
	c.example()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantStatus("egress-staging-web", "10.10.0.12  True Allocated False AssignmentError")
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1"})
	o.set(true)
	_, before := c.records()
	// for the status, which cannot be written now
	c.put("owners/10.10.0.12", egress.Owner{IP: ip("10.10.0.12"), Node: "node-6"})
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+"ids/2"); err != nil {
		c.Fatal(err)
	}
	c.wantRecords("ids/2", map[string]string{"ids/2": `{"id":2,"ip":"10.10.0.12"}`}) // put back: the mirror runs without the API server
	_, after := c.records()
	maps.DeleteFunc(after, func(key string, _ int64) bool { return key == "owners/10.10.0.12" })
	after["ids/2"] = before["ids/2"]
	if d := cmp.Diff(before, after); d != "" {
		c.Errorf("mod revisions (-before +after):\n%s", d)
	}
	o.set(false)
	c.wantStatus("egress-staging-web", "10.10.0.12 node-6 True Allocated True Assigned")
}

func testTakeOver(c *cluster) {
	stop := c.run(c.kube)
	c.example()
	c.wantRecords("allocations/*", map[string]string{
		"allocations/10.10.0.11": "external-ip-pool/1 egress-prod-web", "allocations/10.10.0.12": "external-ip-pool/2 egress-staging-web",
	})
	c.run(c.kube)
	stop()
	c.remove("Egress", "egress-prod-web")
	c.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.12": "external-ip-pool/2 egress-staging-web"})
}

func testStaleReplica(c *cluster) {
	stop := c.run(c.kube)
	c.example()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	members := map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1"}
	c.wantRecords("members/by-egress/*/*", members)
	var o outage
	kube := rest.CopyConfig(c.kube)
	kube.Dial = o.dial
	c.run(kube)
	c.wantCandidates(2)
	o.set(true)
	c.pod("prod", "b", "node-1", "10.244.1.2", "web")
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: late}, spec: {externalIPPool: external-ip-pool, appliedTo: {}}}`)
	members["members/by-egress/egress-prod-web/node-1"] += " prod/b=10.244.1.2"
	c.wantRecords("members/by-egress/*/*", members)
	c.wantRecords("egresses/late", map[string]string{"egresses/late": "10.10.0.13/3"})
	_, before := c.records()
	stop()
	c.wantCandidates(0) // the second replica has won, and given up
	o.set(false)
	c.remove("Egress", "egress-staging-web")
	c.wantRecords("egresses/*", map[string]string{"egresses/egress-prod-web": "10.10.0.11/1", "egresses/late": "10.10.0.13/3"})
	_, after := c.records()
	for _, key := range []string{"egresses/late", "allocations/10.10.0.13", "members/by-egress/egress-prod-web/node-1"} {
		if before[key] == 0 || after[key] != before[key] {
			c.Errorf("%s was written at revision %d, now %d", key, before[key], after[key])
		}
	}
}

func testTakenBack(c *cluster) {
	c.run(c.kube)
	c.example()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantRecords("members/by-egress/*/*", map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1"})
	for i := range 40 {
		c.patchPod("prod", "a", `{"metadata": {"labels": {"app": "none"}}}`)
		time.Sleep(time.Duration(i%8) * time.Millisecond) // what the cache is behind is between 0 and some milliseconds
		c.patchPod("prod", "a", `{"metadata": {"labels": {"app": "web"}}}`)
		// A pod elsewhere, after which everything before it has been looked at.
		c.pod("prod", fmt.Sprintf("b-%d", i), "node-2", fmt.Sprintf("10.244.2.%d", i+1), "web")
		c.eventually(func() error {
			values, _ := c.records()
			if got := values["members/by-egress/egress-prod-web/node-2"]; !strings.Contains(got, fmt.Sprintf("b-%d", i)) {
				return fmt.Errorf("the pod of try %d is not a member: %s", i, got)
			}
			return nil
		})
		c.wantRecords("members/by-egress/*/node-1", map[string]string{"members/by-egress/egress-prod-web/node-1": "prod/a=10.244.1.1"})
	}
}

// wantCandidates waits until so many replicas stand for election, the leader included.
func (c *cluster) wantCandidates(n int64) {
	c.Helper()
	c.eventually(func() error {
		r, err := c.etcd.Client().Get(c.Context(), store.DefaultPrefix+"elections/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err == nil && r.Count != n {
			err = fmt.Errorf("%d candidates, want %d", r.Count, n)
		}
		return err
	})
}

func testLostLeadership(c *cluster) {
	c.run(c.kube)
	c.example()
	c.wantRecords("egresses/*", map[string]string{"egresses/egress-prod-web": "10.10.0.11/1", "egresses/egress-staging-web": "10.10.0.12/2"})
	if _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+"elections/", clientv3.WithPrefix()); err != nil {
		c.Fatal(err)
	}
	c.remove("Egress", "egress-prod-web")
	c.wantRecords("egresses/*", map[string]string{"egresses/egress-staging-web": "10.10.0.12/2"})
	c.etcd.Restart()
	c.remove("Egress", "egress-staging-web")
	c.wantRecords("egresses/*", map[string]string{})
}

func testMany(c *cluster) {
	const n = 100 // each is three records
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {ipRanges: [{cidr: 10.10.0.0/24}], nodeSelector: {}}}`)
	want := map[string]string{}
	for i := range n {
		c.create(fmt.Sprintf(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: e-%03d},
  spec: {externalIPPool: p, appliedTo: {}}}`, i))
	}
	c.run(c.kube)
	for i := range n {
		want[fmt.Sprintf("egresses/e-%03d", i)] = fmt.Sprintf("10.10.0.%d/%d", i+1, i+1)
	}
	c.wantRecords("egresses/*", want)
	c.wantUsage("p", 254, n)
	c.wantStatus("e-099", "10.10.0.100  True Allocated False AssignmentError")
	if err := c.dyn.Resource(v1beta1.EgressResource).DeleteCollection(c.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		c.Fatal(err)
	}
	c.wantRecords("[aei]*/*", map[string]string{})
}

func testSpoiled(c *cluster) {
	c.run(c.kube)
	c.node("node-1", "192.0.2.1")
	c.node("node-2", "192.0.2.2")
	c.example()
	allocations := map[string]string{
		"allocations/10.10.0.11": "external-ip-pool/1 egress-prod-web", "allocations/10.10.0.12": "external-ip-pool/2 egress-staging-web",
	}
	egresses := map[string]string{"egresses/egress-prod-web": "10.10.0.11/1", "egresses/egress-staging-web": "10.10.0.12/2"}
	nodes := map[string]string{"nodes/node-1": "1 192.0.2.1", "nodes/node-2": "2 192.0.2.2"}
	whole := func() {
		c.Helper()
		c.wantRecords("allocations/*", allocations)
		c.wantRecords("egresses/*", egresses)
		c.wantRecords("nodes/*", nodes)
	}
	whole()
	last := 2
	for _, key := range []string{"allocations/10.10.0.12", "egresses/egress-staging-web", "nodes/node-2", "ids/2", "pools/external-ip-pool"} {
		for _, spoil := range []func() error{
			func() error {
				_, err := c.etcd.Client().Put(c.Context(), store.DefaultPrefix+key, "{spoiled")
				return err
			},
			func() error { _, err := c.etcd.Client().Delete(c.Context(), store.DefaultPrefix+key); return err },
		} {
			if err := spoil(); err != nil {
				c.Fatal(err)
			}
			if key == "nodes/node-2" { // which index it had is not known any more
				last++
				nodes[key] = fmt.Sprint(last, " 192.0.2.2")
			}
			whole()
		}
	}
}
