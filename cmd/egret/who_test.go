package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/natlog"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// statusOf is what the process would end with.
func statusOf(err error) int {
	if err == nil {
		return 0
	}
	return exitStatus(err)
}

// node makes the agent of a node that says that a pod has, or had, each port that is asked for but 2050.
func node(t *testing.T, name string) {
	t.Helper()
	was := agentSocket
	agentSocket = fmt.Sprintf("@egret/test-%d-%s", os.Getpid(), name)
	l, err := net.Listen("unix", agentSocket)
	if err != nil {
		t.Fatal(err)
	}
	s := monitor.New(monitor.Config{})
	answer := func(pod string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			q, err := natlog.ParseQuestion(r.URL.Query())
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			a := natlog.Answer{Uses: []natlog.Line{}}
			if q.Port != 2050 {
				a.Uses = append(a.Uses, natlog.Line{Node: name, PodNamespace: "prod", PodName: pod, PodIP: netip.MustParseAddr("10.244.0.1"), Protocol: "tcp",
					DestinationIP: netip.MustParseAddr("192.0.2.1"), DestinationPort: 443, Start: q.From})
			}
			_ = json.NewEncoder(w).Encode(natlog.Reply{Node: name, Answer: a})
		}
	}
	s.Page(agent.ConnectionsPage, answer("web-now"))
	s.Page(agent.LogPage, answer("web-then"))
	done := make(chan error, 1)
	go func() { done <- s.ServeRoot(t.Context(), l) }()
	t.Cleanup(func() { <-done; l.Close(); agentSocket = was })
}

func TestWhoSaysWhichPodHadAPort(t *testing.T) {
	need.Root(t)
	server := etcdtest.New(t)
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{server.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	now := time.Now().UTC().Truncate(time.Second)
	ip := netip.MustParseAddr("203.0.113.5")
	tenure := egress.BlockTenure{IP: ip, First: 2048, Size: 64, Node: "n2", Egress: "web", Since: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)}
	bad := tenure
	bad.IP = netip.MustParseAddr("203.0.113.6")
	static := netip.MustParseAddr("203.0.113.8")
	ofStatic := egress.Tenure{IP: static, Node: "n1", Since: now.Add(-3 * time.Hour), Why: egress.ReasonStatic}
	for key, r := range map[string]any{
		store.AllocationKey(ip):       egress.Allocation{IP: ip, ID: 5, Egresses: []string{"web"}, Since: now.Add(-3 * time.Hour)},
		store.BlockKey(ip, 2048):      egress.Block{IP: ip, First: 2048, Size: 64, Node: "n1", Egress: "web", Since: now.Add(-30 * time.Minute)},
		store.BlockKey(ip, 4096):      egress.Block{IP: ip, First: 4096, Size: 64, Node: "n1", Egress: "web", Since: now.Add(-150 * time.Minute)},
		store.BlockHistoryKey(tenure): tenure,
		store.AllocationKey(static):   egress.Allocation{IP: static, ID: 8, Egresses: []string{"mail", "web"}, Since: now.Add(-3 * time.Hour)},
		store.HistoryKey(ofStatic):    ofStatic,
		store.BlockHistoryKey(bad):    "no record",
		store.AllocationKey(bad.IP):   egress.Allocation{IP: bad.IP, ID: 6, Egresses: []string{"x"}, Since: now},
		store.NodeKey("n1"):           egress.Node{Name: "n1", Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
		store.HistoryKey(egress.Tenure{IP: ip, Node: "n1", Since: now.Add(-3 * time.Hour)}): egress.Tenure{IP: ip, Node: "n1", Since: now.Add(-3 * time.Hour), Why: egress.ReasonClaim},
	} {
		value, err := store.Encode(r)
		if err == nil {
			_, err = server.Client().Put(t.Context(), store.DefaultPrefix+key, string(value))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	node(t, "n1")
	for name, tt := range map[string]struct {
		args   string
		status int
		want   []string // of the output, or of the error
	}{
		"now, of the node's own agent":             {"203.0.113.5:2048", 0, []string{"node n1, ports 2048-2111, egress web", "prod/web-now", "192.0.2.1:443"}},
		"a minute ago":                             {"203.0.113.5:2049 --at 1m", 0, []string{"node n1", "prod/web-then"}},
		"of another node, which is not reached":    {"203.0.113.5:2048 --at 90m", 1, []string{"node n2, ports 2048-2111", "kubectl exec -n egret-system", "spec.nodeName=n2", "egret who '203.0.113.5:2048' --at"}},
		"as it rested":                             {"203.0.113.5:2048 --at 59m", 1, []string{"node n2", "it rested then"}},
		"of nobody, between two":                   {"203.0.113.5:2048 --at 45m", 2, []string{"no pod had 203.0.113.5:2048"}},
		"a port of no block":                       {"203.0.113.5:5000", 2, []string{"no pod had 203.0.113.5:5000"}},
		"a port of a block that no pod uses":       {"203.0.113.5:2050", 2, []string{"node n1", "no pod had 203.0.113.5:2050"}},
		"before the IP was one":                    {"203.0.113.5:2048 --at 10h", 1, []string{"etcd does not remember"}},
		"a port of the gateway's":                  {"203.0.113.5:1024", 0, []string{"node n1, as the gateway", "prod/web-now"}},
		"toward somebody else":                     {"203.0.113.5:2048 --to 192.0.2.9", 2, []string{"no pod had"}},
		"by another protocol":                      {"203.0.113.5:2048 --protocol udp", 2, []string{"no pod had"}},
		"a record that cannot be read":             {"203.0.113.6:2048", 1, []string{"could not be read"}},
		"in JSON":                                  {"203.0.113.5:2048 -o json", 0, []string{`"pod_name": "web-now"`, `"nodes": [`}},
		"a port of no block, in JSON":              {"203.0.113.5:5000 -o json", 2, []string{`"nodes": []`, `"connections": []`}},
		"no egress IP":                             {"203.0.113.7:2048", 1, []string{"203.0.113.7 is no egress IP", "egret get allocations"}},
		"no port":                                  {"203.0.113.5", 1, []string{`"203.0.113.5": want an egress IP and a port`}},
		"below what a gateway translates to":       {"203.0.113.5:80", 2, []string{"no pod had 203.0.113.5:80"}},
		"of a static IP":                           {"203.0.113.8:41012", 0, []string{"node n1, as the gateway", "egress mail,web", "prod/web-now"}},
		"of a static IP, a minute ago":             {"203.0.113.8:41012 --at 1m", 0, []string{"node n1, as the gateway", "prod/web-then"}},
		"of a static IP, a port that a pod chose":  {"203.0.113.8:80", 0, []string{"node n1, as the gateway", "prod/web-now"}},
		"a port that no connection has":            {"203.0.113.8:0", 1, []string{"port 0: no connection"}},
		"a time that is none":                      {"203.0.113.5:2048 --at noon", 1, []string{`--at "noon": want a time like`}},
		"a time in the future":                     {"203.0.113.5:2048 --at " + now.Add(time.Hour).Format(time.RFC3339), 1, []string{"in the future"}},
		"a format that is none":                    {"203.0.113.5:2048 -o xml", 1, []string{`"xml"`}},
		"half a way to other agents":               {"203.0.113.5:2048 --agents-port 8481", 1, []string{"belong together"}},
		"a destination that is none":               {"203.0.113.5:2048 --to x", 1, []string{`--to "x"`}},
		"a log that is not there":                  {"203.0.113.5:2048 --log /none", 1, []string{"/none"}},
		"an IPv6 address without its own brackets": {"2001:db8::5:2048", 1, []string{"[2001:db8::5]:41012"}},
	} {
		says(t, name, append([]string{"who", "--endpoints", server.Endpoint()}, strings.Fields(tt.args)...), tt.status, tt.want...)
	}
}

// says runs a command, and wants an exit status, and texts in what it prints and its error together, which it returns.
func says(t *testing.T, name string, args []string, status int, texts ...string) string {
	t.Helper()
	got, err := run(t, args...)
	if err != nil {
		got += err.Error()
	}
	for _, want := range texts {
		if !strings.Contains(got, want) {
			t.Errorf("%s: %q is not in\n%s", name, want, got)
		}
	}
	if s := statusOf(err); s != status {
		t.Errorf("%s: status %d, want %d\n%s", name, s, status, got)
	}
	return got
}

func TestWhoSearchesLogsThatWereCollected(t *testing.T) {
	noon := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	name := filepath.Join(t.TempDir(), "log")
	log := `{"version":1,"event":"log_start","time":"2026-11-28T12:00:00Z","node":"n1"}
{"version":1,"event":"new","time":"2026-11-28T12:03:00Z","node":"n1","egress_ip":"203.0.113.5","port":41012,"pod_namespace":"prod","pod_name":"web-1","pod_ip":"10.0.0.1","protocol":"tcp","destination_ip":"192.0.2.1","destination_port":443,"id":1,"start":"2026-11-28T12:03:00Z"}
{"version":1,"event":"end","time":"2026-11-28T12:05:00Z","node":"n1","egress_ip":"203.0.113.5","port":41012,"pod_namespace":"prod","pod_name":"web-1","pod_ip":"10.0.0.1","protocol":"tcp","destination_ip":"192.0.2.1","destination_port":443,"id":1,"start":"2026-11-28T12:03:00Z","stop":"2026-11-28T12:05:00Z"}
{"version":1,"event":"new","time":"2026-11-28T12:06:00Z","node":"n1","egress_ip":"203.0.113.5","port":41013,"pod_name":"web-2","id":2}
`
	if err := os.WriteFile(name, []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	for at, want := range map[time.Duration]string{3*time.Minute + 4*time.Second: "0 prod/web-1", 2 * time.Minute: "2 no pod had", 10 * time.Minute: "1 the log ends at 2026-11-28T12:06:00Z"} {
		got, err := run(t, "who", "203.0.113.5:41012", "--at", noon.Add(at).Format(time.RFC3339), "--log", name)
		if err != nil {
			got += err.Error()
		}
		status, text, _ := strings.Cut(want, " ")
		if fmt.Sprint(statusOf(err)) != status || !strings.Contains(got, text) {
			t.Errorf("after %v: status %d, %s; want %s", at, statusOf(err), got, want)
		}
	}
	var v operator.Verdict
	if _, err := run(t, "who", "203.0.113.5:41012", "--log", name); !errors.As(err, &v) || v.Status != 1 {
		t.Errorf("now, by a log that ended: %v, want that it is not known", err)
	}
}
