package bundle

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
)

func TestABundleOfANodeHasWhatIsInItsKernel(t *testing.T) {
	daemon := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/metrics":
			fmt.Fprintln(w, "egret_up 1")
		case "/readyz":
			http.Error(w, "etcd: not answered", http.StatusServiceUnavailable)
		case "/healthz": // an impostor
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		case "/log-level":
			fmt.Fprint(w, strings.Repeat("x", maxFile+10))
		}
	}))
	defer daemon.Close()
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	netns.Enter(t)
	netns.Run(t, "ip link add egret0 type bridge")
	netns.Run(t, "ip rule add pref 1200 fwmark 0x3ffe/0x83fff lookup 15190 protocol 94")
	netns.Run(t, fmt.Sprintf("conntrack -I -s 10.244.0.1 -d 192.0.2.7 -p udp --sport 1000 --dport 53 -t 600 -m %d", egress.ID(7).ConnMark()))
	if !OnNode() {
		t.Error("a node with Egret's links is not taken for one")
	}
	tables, err := nft.New(nft.Config{Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	have, err := tables.Observe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tables.Apply(nft.Diff(have, nft.State{Pods: map[netip.Addr]egress.ID{netip.MustParseAddr("10.244.0.1"): 7}})); err != nil {
		t.Fatal(err)
	}
	m, files := bundled(t, Config{Node: true, Agent: strings.TrimPrefix(daemon.URL, "http://"), Crdsync: nobody.Addr().String(), Timeout: time.Minute})
	for name, want := range map[string]string{
		"kernel.txt":        "/proc/loadavg:",
		"nftables.txt":      "10.244.0.1 : 0x0e9e0007",
		"nft.txt":           "table inet egret",
		"routing.txt":       "ip -4 rule pref 1200",
		"rules.txt":         "IPv4 1200: mark 0x3ffe/0x83fff table 15190",
		"links.txt":         "egret0 type bridge",
		"sysctls.txt":       "net/ipv4/conf/all/rp_filter = ",
		"conntrack.txt":     "1 of the egress IP with id 7\n1 of Egret's in all\n",
		"agent-metrics.txt": "egret_up 1",
		"agent-readyz.txt":  "503 Service Unavailable\netcd: not answered",
		"agent-healthz.txt": "302 Found",
	} {
		if !strings.Contains(files["node/"+name], want) {
			t.Errorf("%s: %q is not in\n%.2000s", name, want, files["node/"+name])
		}
	}
	var findings []check.Finding
	if err := json.Unmarshal([]byte(files["node/check.json"]), &findings); err != nil || len(findings) < 10 {
		t.Errorf("check.json: %v\n%s", err, files["node/check.json"])
	}
	for _, f := range m.Failed() {
		if f.Name != "node/agent-log-level.txt" && f.Name != "etcd" {
			t.Errorf("%s: %s", f.Name, f.Error)
		}
	}
	if len(files["node/agent-log-level.txt"]) != maxFile {
		t.Errorf("of what answers without end there are %d bytes", len(files["node/agent-log-level.txt"]))
	}
	for name := range files {
		if strings.HasPrefix(name, "node/crdsync") {
			t.Errorf("%s, of a daemon that is not there", name)
		}
	}
}
