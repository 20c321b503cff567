package lab_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// TestLab walks one lab, whose egret only stands in, through what can be done to it: the steps share it, for it takes
// seconds to build.
func TestLab(t *testing.T) {
	needLab(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// its crdsync only stands in
	l := up(t, lab.Config{Name: uniqueName(t, "walk"), Nodes: 2, Egret: self, NoWebhook: true})
	for _, p := range []lab.PodConfig{
		{Name: "prod/a", Node: "node-1", Labels: map[string]string{"app": "web"}}, {Name: "prod/b", Node: "node-2"},
	} {
		if _, err := l.Pod(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		name string
		run  func(*testing.T, *lab.Lab)
	}{
		{"a second lab of the name is refused", secondUp},
		{"pods are in the API as a kubelet reports them", podsInAPI},
		{"pods leave with the address of their node", sources},
		{"an address is given to the next pod", reuse},
		{"a probe counts and loses nothing", probe},
		{"the sniffers see sources and ARP", sniff},
		{"etcd keeps its data when it is stopped", etcdData},
		{"a node is cut off and healed", cutAndHeal},
		{"a node is powered off and boots again", crashAndRecover},
		{"an agent is frozen, thawed, stopped and started", agentSignals},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, l) }) {
			break
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func secondUp(t *testing.T, l *lab.Lab) {
	_, err := lab.Up(t.Context(), lab.Config{Name: l.Name(), Bare: true})
	if err == nil || !strings.Contains(err.Error(), "egret-lab --name "+l.Name()+" down") {
		t.Errorf("got error %v, want one that names the command that removes it", err)
	}
}

func podsInAPI(t *testing.T, l *lab.Lab) {
	out, err := l.Kubectl(t.Context(), "get", "pod", "-n", "prod", "a", "-o",
		`jsonpath={.spec.nodeName} {.metadata.labels.app} {.status.phase} {.status.podIP} {.status.conditions[?(@.type=="Ready")].status}`)
	must(t, err)
	if diff := cmp.Diff("node-1 web Running 10.244.1.2 True", string(out)); diff != "" {
		t.Errorf("pod prod/a (-want +got):\n%s", diff)
	}
}

func wantSource(t *testing.T, l *lab.Lab, pod string, want netip.Addr) {
	t.Helper()
	got, err := l.Source(t.Context(), pod)
	must(t, err)
	if got != want {
		t.Errorf("source of pod %s: got %v, want %v", pod, got, want)
	}
}

func sources(t *testing.T, l *lab.Lab) {
	wantSource(t, l, "prod/a", lab.NodeIP(1))
	wantSource(t, l, "prod/b", lab.NodeIP(2))
}

func reuse(t *testing.T, l *lab.Lab) {
	first, err := l.Pod(t.Context(), lab.PodConfig{Name: "staging/c", Node: "node-1"})
	must(t, err)
	must(t, l.RemovePod(t.Context(), "staging/c"))
	second, err := l.Pod(t.Context(), lab.PodConfig{Name: "staging/d", Node: "node-1"})
	must(t, err)
	must(t, l.RemovePod(t.Context(), "staging/d"))
	if diff := cmp.Diff(first.IPs, second.IPs, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("addresses (-first +second):\n%s", diff)
	}
	if _, err := l.Source(t.Context(), "staging/d"); err == nil {
		t.Error("source of a removed pod: got no error")
	}
}

func probe(t *testing.T, l *lab.Lab) {
	r, err := l.Probe(t.Context(), "prod/a", 2*time.Millisecond, 400*time.Millisecond)
	must(t, err)
	if diff := cmp.Diff(map[netip.Addr]int{lab.NodeIP(1): 200}, r.Sources); diff != "" || r.Sent != 200 || r.Lost != 0 {
		t.Errorf("got %v, want 200 sent and none lost; sources (-want +got):\n%s", r, diff)
	}
	// One that is interrupted says what it has measured. On a busy machine it may have sent nothing within the first
	// second.
	for within := 100 * time.Millisecond; ; within *= 2 {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		r, err = l.Probe(ctx, "prod/a", time.Millisecond, time.Hour)
		cancel()
		must(t, err)
		if most := int(time.Since(began)/time.Millisecond) + 1; r.Sent > most || r.Sent == 0 && within > 10*time.Second {
			t.Errorf("sent within %v, then interrupted: %d, want 1 to %d", within, r.Sent, most)
		}
		if r.Sent > 0 || t.Failed() {
			break
		}
	}
}

func sniff(t *testing.T, l *lab.Lab) {
	outside, err := l.Sniff(t.Context(), "outside")
	must(t, err)
	lan, err := l.Sniff(t.Context(), "lan")
	must(t, err)
	_, err = l.Exec(t.Context(), "node", "node-2", "ip", "neigh", "flush", "dev", "eth0")
	must(t, err)
	wantSource(t, l, "prod/b", lab.NodeIP(2))
	must(t, outside.Stop())
	must(t, lan.Stop())
	seen := 0
	for _, p := range outside.Packets() {
		if p.Dst == lab.OutsideIP && p.DstPort == lab.EchoPort {
			seen++
			if p.Src != lab.NodeIP(2) {
				t.Errorf("source outside: %v", p)
			}
		}
	}
	if seen < 3 { // SYN, ACK, FIN
		t.Errorf("packets of the connection seen outside: got %d, want at least 3 of %v", seen, outside.Packets())
	}
	asked, answered := 0, 0
	for _, a := range lan.ARPs() {
		if a.Operation == 1 && a.SenderIP == lab.NodeIP(2) && a.TargetIP == lab.OutsideLAN && a.Port == "to-node-2" {
			asked++
		}
		if a.Operation == 2 && a.SenderIP == lab.OutsideLAN && a.TargetIP == lab.NodeIP(2) && a.Port == "to-outside" {
			answered++
		}
	}
	if asked != 1 || answered != 1 {
		t.Errorf("ARP for the outside host: %d requests, %d replies, want one of each in %v", asked, answered, lan.ARPs())
	}
}

func etcdData(t *testing.T, l *lab.Lab) {
	client, err := clientv3.New(clientv3.Config{Endpoints: l.EtcdEndpoints(), Logger: zap.NewNop()})
	must(t, err)
	defer client.Close()
	_, err = client.Put(t.Context(), "k", "v")
	must(t, err)
	must(t, l.Stop(t.Context(), "etcd", ""))
	must(t, l.Stop(t.Context(), "etcd", ""))
	if _, err := l.Kubectl(t.Context(), "get", "nodes"); err != nil {
		t.Errorf("the API server without Egret's etcd: %v", err)
	}
	must(t, l.Start(t.Context(), "etcd", ""))
	resp, err := client.Get(t.Context(), "k")
	must(t, err)
	if len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != "v" {
		t.Errorf("key k after a restart: got %v, want v", resp.Kvs)
	}
}

// reaches reports whether a node can open a connection; refused counts as reached.
func reaches(t *testing.T, l *lab.Lab, node string, to netip.Addr, port uint16) bool {
	t.Helper()
	var conn net.Conn
	err := l.In("node", node, func() (err error) {
		conn, err = net.DialTimeout("tcp", netip.AddrPortFrom(to, port).String(), 300*time.Millisecond)
		return err
	})
	if err == nil {
		conn.Close()
	}
	return err == nil || strings.Contains(err.Error(), "refused")
}

func cutAndHeal(t *testing.T, l *lab.Lab) {
	all := map[string]bool{"etcd": true, "peers": true, "uplink": true}
	look := func() map[string]bool {
		return map[string]bool{
			"etcd":   reaches(t, l, "node-1", lab.ControlIP, 2379),
			"peers":  reaches(t, l, "node-1", lab.NodeIP(2), 9),
			"uplink": reaches(t, l, "node-1", lab.OutsideLAN, lab.EchoPort),
		}
	}
	for _, what := range []string{"etcd", "peers", "uplink"} {
		must(t, l.Cut(t.Context(), "node-1", what))
		must(t, l.Cut(t.Context(), "node-1", what))
		want := map[string]bool{"etcd": true, "peers": true, "uplink": true, what: false}
		if what == "uplink" {
			want = map[string]bool{"etcd": false, "peers": false, "uplink": false}
		}
		if diff := cmp.Diff(want, look()); diff != "" {
			t.Errorf("cut off from %s, reaches (-want +got):\n%s", what, diff)
		}
		st, err := lab.ReadStatus(t.Context(), l.Name())
		must(t, err)
		if diff := cmp.Diff([]string{what}, st.Nodes[0].Cuts); diff != "" {
			t.Errorf("cuts in the status (-want +got):\n%s", diff)
		}
		must(t, l.Heal(t.Context(), "node-1", what))
		must(t, l.Heal(t.Context(), "node-1", what))
		var diff string
		// an ARP request that was lost is repeated after 1 s
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
			if diff = cmp.Diff(all, look()); diff == "" {
				break
			}
		}
		if diff != "" {
			t.Errorf("healed from %s, reaches (-want +got):\n%s", what, diff)
		}
	}
}

func crashAndRecover(t *testing.T, l *lab.Lab) {
	_, err := l.Exec(t.Context(), "node", "node-2", "ip", "route", "add", "192.0.2.0/24", "via", "10.10.0.200")
	must(t, err)
	must(t, l.Crash(t.Context(), "node-2"))
	if reaches(t, l, "node-1", lab.NodeIP(2), 9) {
		t.Error("a powered-off node answers")
	}
	if agent := agentState(t, l, 2); agent != "stopped" {
		t.Errorf("agent of a powered-off node: %s", agent)
	}
	must(t, l.Recover(t.Context(), "node-2"))
	wantSource(t, l, "prod/b", lab.NodeIP(2))
	if agent := agentState(t, l, 2); agent != "running" {
		t.Errorf("agent of a node that booted: %s", agent)
	}
	out, err := l.Exec(t.Context(), "node", "node-2", "ip", "route", "show", "192.0.2.0/24")
	must(t, err)
	if len(out) > 0 {
		t.Errorf("a route outlived the boot: %s", out)
	}
}

func agentState(t *testing.T, l *lab.Lab, node int) string {
	t.Helper()
	st, err := lab.ReadStatus(t.Context(), l.Name())
	must(t, err)
	return st.Nodes[node-1].Agent
}

func agentSignals(t *testing.T, l *lab.Lab) {
	for _, step := range []struct {
		verb string
		run  func() error
		want string
	}{
		{"frozen", func() error { return l.Freeze(t.Context(), "node-1") }, "frozen"},
		{"thawed", func() error { return l.Thaw(t.Context(), "node-1") }, "running"},
		{"frozen again", func() error { return l.Freeze(t.Context(), "node-1") }, "frozen"},
		{"stopped while frozen", func() error { return l.Stop(t.Context(), "agent", "node-1") }, "stopped"},
		{"started", func() error { return l.Start(t.Context(), "agent", "node-1") }, "running"},
	} {
		must(t, step.run())
		if got := agentState(t, l, 1); got != step.want {
			t.Fatalf("%s: the agent's state is %s, want %s", step.verb, got, step.want)
		}
	}
	if err := l.Start(t.Context(), "agent", "node-3"); err == nil {
		t.Error("starting the agent of a node that is not there: got no error")
	}
	var exit interface{ ExitCode() int }
	if _, err := l.Exec(t.Context(), "outside", "", "sh", "-c", "exit 3"); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("a command that ends with status 3: got error %v", err)
	}
}
