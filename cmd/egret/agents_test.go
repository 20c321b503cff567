package main

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/natlog"
	"github.com/egret-project/egret/store"
)

// remote serves what the agent of a node answers at its --metrics-address, over mTLS, to the client named auditor, and
// what it tells of its kernel to that named egret-crdsync, too.
func remote(t *testing.T, ca authority, name, address string, agents int, kernel *egress.Kernel) {
	t.Helper()
	dir := t.TempDir()
	c, key := ca.issue(&x509.Certificate{Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.ParseIP(address)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	ca.write(dir, tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key})
	file := func(name string) string { return filepath.Join(dir, name) }
	s := monitor.New(monitor.Config{Remote: fmt.Sprintf("%s:%d", address, agents), Readers: []string{"auditor"}, Tracers: []string{"egret-crdsync"},
		TLS: monitor.TLS{Cert: file("tls.crt"), Key: file("tls.key"), ClientCA: file("ca.crt")}})
	s.Page(agent.ConnectionsPage, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q, err := natlog.ParseQuestion(r.URL.Query())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		uses := []natlog.Line{{Node: name, PodNamespace: "prod", PodName: "web-1", Protocol: "tcp", DestinationIP: netip.MustParseAddr("192.0.2.1"), DestinationPort: 443, Start: q.From}}
		_ = json.NewEncoder(w).Encode(natlog.Reply{Node: name, Answer: natlog.Answer{Uses: uses}})
	}))
	if kernel != nil {
		s.Trace(agent.KernelPage, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := egress.ParseKernelQuestion(r.URL.Query()); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			_ = json.NewEncoder(w).Encode(kernel)
		}))
	}
	s.Share(agent.TrafficPage, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ips := map[netip.Addr]egress.Traffic{netip.MustParseAddr("203.0.113.5"): {SentPackets: 7}}
		_ = json.NewEncoder(w).Encode(egress.NodeTraffic{Node: name, IPs: ips})
	}))
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context()) }()
	t.Cleanup(func() { <-done })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", s.Remote); err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the agent of %s does not listen", name)
		}
	}
}

// TestAgentsAreAskedOverMTLS asks the agents of other nodes, as `egret who` and `egret trace` do, by certificates of
// the right name, of another one, and of another CA.
func TestAgentsAreAskedOverMTLS(t *testing.T) {
	server, ca := etcdtest.New(t), newAuthority(t)
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{server.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	was := agentSocket
	agentSocket = "@egret/test-nobody" // there is no agent on this node
	t.Cleanup(func() { agentSocket = was })
	now := time.Now().UTC().Truncate(time.Second)
	ip, pod := netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("10.244.1.5")
	block := egress.Block{IP: ip, First: 2048, Size: 64, Node: "n1", Egress: "web", Since: now.Add(-time.Hour)}
	lease, err := server.Client().Grant(t.Context(), 600)
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string, r any) {
		t.Helper()
		value, err := store.Encode(r)
		if err == nil {
			_, err = server.Client().Put(t.Context(), store.DefaultPrefix+key, string(value), clientv3.WithLease(lease.ID))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put(store.AllocationKey(ip), egress.Allocation{IP: ip, ID: 5, Pool: "pool", Egresses: []string{"web"}, Since: now.Add(-3 * time.Hour)})
	put(store.PoolKey("pool"), egress.Pool{Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip}}})
	put(store.EgressKey("web"), egress.Policy{Name: "web", Created: now, Addresses: []egress.Address{{IP: ip, ID: 5, Pool: "pool"}}})
	put(store.BlockKey(ip, 2048), block)
	for i, n := range []string{"n1", "n2"} {
		put(store.NodeKey(n), egress.Node{Name: n, Index: i + 1, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, byte(11 + i)})}})
		put(store.AgentKey(n), egress.Agent{Node: n, Lease: egress.FormatLease(int64(lease.ID)), Version: "v1"})
	}
	put(store.OwnerKey(ip), egress.Owner{IP: ip, Node: "n2", Lease: int64(lease.ID), Since: now, Why: egress.ReasonClaim})
	members := egress.Members{Egress: "web", Node: "n1", Pods: []egress.Member{{Pod: "prod/web-1", IPs: []netip.Addr{pod}}}, Blocks: []egress.Block{block}}
	put(store.MembersByEgressKey("web", "n1"), members)
	put(store.MembersByNodeKey("n1", "web"), members)

	good, silent, older := port.Hold(t), port.Hold(t), port.Hold(t)
	home := &egress.Kernel{Node: "n1", Watching: true, PodID: 5, Steered: true, Gateway: 2, First: 2048, Ports: 64, Guarded: -1}
	remote(t, ca, "n1", "127.0.0.11", good, home)
	// which has no permit
	remote(t, ca, "n2", "127.0.0.12", good, &egress.Kernel{Node: "n2", Watching: true, Guarded: -1})
	// and n2 is not there
	remote(t, ca, "n1", "127.0.0.11", silent, home)
	// of an older version
	remote(t, ca, "n1", "127.0.0.11", older, nil)
	remote(t, ca, "n2", "127.0.0.12", older, nil)

	client := func(ca authority, name string) (args []string) {
		dir := t.TempDir()
		ca.write(dir, ca.pair(x509.ExtKeyUsageClientAuth, name))
		return []string{"--agents-cert-file", filepath.Join(dir, "tls.crt"), "--agents-key-file", filepath.Join(dir, "tls.key")}
	}
	roots := t.TempDir()
	ca.write(roots, ca.pair(x509.ExtKeyUsageClientAuth, "any"))
	auditor, crdsync, prometheus, stranger := client(ca, "auditor"), client(ca, "egret-crdsync"), client(ca, "prometheus"), client(newAuthority(t), "auditor")
	for name, tt := range map[string]struct {
		command string
		port    int
		shows   []string
		status  int
		want    []string
	}{
		"who, by a certificate that is named":      {"who 203.0.113.5:2048", good, auditor, 0, []string{"prod/web-1", "192.0.2.1:443"}},
		"who, by one that is not":                  {"who 203.0.113.5:2048", good, prometheus, 1, []string{"none of --who-clients"}},
		"who, by one of another CA":                {"who 203.0.113.5:2048", good, stranger, 1, []string{"not known: asking the agent of node n1"}},
		"trace, by a certificate that is named":    {"trace prod/web-1", good, auditor, 2, []string{"n1 has the pod, and its next hop", "It does not get through: n2 has no permit for 203.0.113.5"}},
		"trace, by one for traces":                 {"trace prod/web-1", good, crdsync, 2, []string{"n1 has the pod, and its next hop", "n2 has no permit for 203.0.113.5"}},
		"who, by one for traces":                   {"who 203.0.113.5:2048", good, crdsync, 1, []string{"none of --who-clients"}},
		"trace, by one that is not":                {"trace prod/web-1", good, prometheus, 0, []string{"n1 is told by the records alone", "none of --who-clients", "As far as etcd tells it gets through"}},
		"live, by one that is not":                 {"trace prod/web-1 --live --to 198.51.100.9", good, prometheus, 3, []string{"n2 follows no packet", "none of --who-clients"}},
		"live, of agents of an older version":      {"trace prod/web-1 --live --to 198.51.100.9", older, auditor, 3, []string{"follows no packet", "of an older version"}},
		"trace, by one of another CA":              {"trace prod/web-1", good, stranger, 0, []string{"n2 is told by the records alone", "As far as etcd tells it gets through"}},
		"trace, beside an agent that is not there": {"trace prod/web-1", silent, auditor, 0, []string{"n1 has the pod", "n2 is told by the records alone", "As far as etcd tells it gets through"}},
		"trace, of agents of an older version":     {"trace prod/web-1", older, auditor, 0, []string{"is of an older version", "As far as etcd tells it gets through"}},
		"trace, without a certificate": {"trace prod/web-1 -n prod-egress", 0, nil, 0, []string{"As far as etcd tells it gets through", "not asked", "the agents of n1 and n2 are not reached",
			"that of n1, `kubectl exec -n prod-egress $(kubectl get pods -n prod-egress -o name -l app.kubernetes.io/name=egret-agent " +
				"--field-selector spec.nodeName=n1) -- egret trace prod/web-1`"}},
		"trace, with half a way to agents": {"trace prod/web-1", good, nil, 1, []string{"belong together"}},
	} {
		args := append(strings.Fields(tt.command), "--endpoints", server.Endpoint())
		if tt.port != 0 {
			args = append(append(args, "--agents-port", fmt.Sprint(tt.port), "--agents-ca-file", filepath.Join(roots, "ca.crt")), tt.shows...)
		}
		got := says(t, name, args, tt.status, tt.want...)
		if tt.port == 0 && strings.Contains(got, "records alone") {
			t.Errorf("%s: nobody was asked\n%s", name, got)
		}
	}

	// Traffic is for who may read metrics.
	for name, tt := range map[string]struct {
		shows         []string
		node, address string
		want          string // in the error; empty: there is none
	}{
		"by a certificate that is named for nothing": {prometheus, "n2", "127.0.0.12", ""},
		"by one of another CA":                       {stranger, "n2", "127.0.0.12", "does not take the certificate of --agents-cert-file"},
		"where another node's agent answers":         {prometheus, "n2", "127.0.0.11", "that of node n1"},
	} {
		f := agentsFlags{port: good, files: monitor.ClientTLS{CA: filepath.Join(roots, "ca.crt"), Cert: tt.shows[1], Key: tt.shows[3]}}
		agents, err := f.forPage(nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := agents.Traffic(t.Context(), tt.node, []netip.Addr{netip.MustParseAddr(tt.address)})
		if tt.want == "" && (err != nil || got.IPs[ip].SentPackets != 7) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("traffic, %s: %v, %v; want %q", name, got, err, tt.want)
		}
	}
	// The certificate is replaced while crdsync runs.
	f := agentsFlags{port: good, files: monitor.ClientTLS{CA: filepath.Join(roots, "ca.crt"), Cert: stranger[1], Key: stranger[3]}}
	agents, err := f.forPage(nil)
	if err != nil {
		t.Fatal(err)
	}
	ca.write(filepath.Dir(stranger[1]), ca.pair(x509.ExtKeyUsageClientAuth, "prometheus"))
	if got, err := agents.Traffic(t.Context(), "n2", []netip.Addr{netip.MustParseAddr("127.0.0.12")}); err != nil || got.IPs[ip].SentPackets != 7 {
		t.Errorf("traffic, by a certificate that was replaced: %v, %v", got, err)
	}
}
