package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/page"
)

const agentsName = "egret-agent.egret-system.svc"

// asked is an agent that answers about traffic, at 127.0.0.1, and shows a certificate that can be replaced.
type asked struct {
	port  int
	shows atomic.Pointer[tls.Certificate]
	hears atomic.Pointer[x509.CertPool]
}

func newAsked(t *testing.T, shows tls.Certificate, hears authority) *asked {
	t.Helper()
	a := &asked{}
	a.shows.Store(&shows)
	a.hear(hears)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(egress.NodeTraffic{Node: "n1", Read: time.Hour}) // who asked has gone
	}))
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*a.shows.Load()},
			ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.hears.Load()}, nil
	}}
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	a.port = s.Listener.Addr().(*net.TCPAddr).Port
	return a
}

func (a *asked) hear(ca authority) {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	a.hears.Store(pool)
}

// agentCertificate is one that is for no address, as a chart gives all agents.
func (a authority) agentCertificate(use x509.ExtKeyUsage, name string) tls.Certificate {
	a.Helper()
	c, key := a.issue(&x509.Certificate{DNSNames: []string{name}, ExtKeyUsage: []x509.ExtKeyUsage{use}})
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}
}

// trafficOf returns what asks agents at a port, by the files of a directory.
func trafficOf(t *testing.T, port int, dir, name string) page.AskTraffic {
	t.Helper()
	f := agentsFlags{port: port, files: monitor.ClientTLS{
		CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ServerName: name}}
	agents, err := f.forPage(nil)
	if err != nil {
		t.Fatal(err)
	}
	return agents.Traffic
}

var here = []netip.Addr{netip.MustParseAddr("127.0.0.1")}

// Agents of a chart have one certificate, for a name. What else has a certificate of the same CA is no agent: neither
// who may read metrics, nor another server of that CA.
func TestAgentsAreKnownByTheNameOfTheirCertificate(t *testing.T) {
	ca, another := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	ca.write(dir, ca.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"))
	server := x509.ExtKeyUsageServerAuth
	for name, tt := range map[string]struct {
		shows tls.Certificate
		asks  string // --agents-server-name
		want  string // in the error; empty: there is none
	}{
		"the name of all agents":             {ca.agentCertificate(server, agentsName), agentsName, ""},
		"another name":                       {ca.agentCertificate(server, "egret-crdsync.egret-system.svc"), agentsName, "for " + agentsName + " (--agents-server-name)"},
		"the address of the node alone":      {ca.pair(server, "n1"), agentsName, "does not prove that it is the agent of node n1"},
		"the name, of another CA":            {another.agentCertificate(server, agentsName), agentsName, "of a CA of --agents-ca-file"},
		"the name, of who reads metrics":     {ca.agentCertificate(x509.ExtKeyUsageClientAuth, agentsName), agentsName, "does not prove that it is the agent of node n1"},
		"the name, and the address is asked": {ca.agentCertificate(server, agentsName), "", "for 127.0.0.1, unless --agents-server-name says another name"},
		"the address of the node":            {ca.pair(server, "n1"), "", ""},
	} {
		agent := newAsked(t, tt.shows, ca)
		got, err := trafficOf(t, agent.port, dir, tt.asks)(t.Context(), "n1", here)
		if tt.want == "" && (err != nil || got.Read != time.Hour) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, %v; want %q", name, got, err, tt.want)
		}
	}
	for _, bad := range []string{"*.egret-system.svc", "Agent", "a b", "-"} {
		f := agentsFlags{port: 1, files: monitor.ClientTLS{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ServerName: bad}}
		if _, err := f.client(nil); err == nil || !strings.Contains(err.Error(), "--agents-server-name") {
			t.Errorf("--agents-server-name %q: %v", bad, err)
		}
	}
	f := agentsFlags{files: monitor.ClientTLS{ServerName: agentsName}}
	if _, err := f.client(nil); err == nil || !strings.Contains(err.Error(), "belong together") {
		t.Errorf("--agents-server-name alone: %v", err)
	}
}

// All that has a certificate gets another one, of another CA, while crdsync runs: the CA's file has both at first.
func TestTheCAOfAgentsIsReplacedWhileTheyAreAsked(t *testing.T) {
	first, second := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	first.write(dir, first.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"))
	agent := newAsked(t, first.agentCertificate(x509.ExtKeyUsageServerAuth, agentsName), first)
	ask := trafficOf(t, agent.port, dir, agentsName)
	works := func(when string) {
		t.Helper()
		if _, err := ask(t.Context(), "n1", here); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	works("at first")
	next := second.agentCertificate(x509.ExtKeyUsageServerAuth, agentsName)
	agent.shows.Store(&next)
	if _, err := ask(t.Context(), "n1", here); err == nil {
		t.Error("an agent of a CA that nobody told of was heard")
	}
	second.write(dir, second.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"))
	agent.hear(second)
	works("all of the second CA")
	for _, name := range []string{"ca.crt", "tls.crt", "tls.key"} { // as while they are replaced, one after the other
		whole := contents(t, file(name))
		replace(t, file(name), "-----BEGIN")
		works(name + " is half written")
		replace(t, file(name), whole)
	}
	works("whole again")
	first.write(dir, first.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"))
	if _, err := ask(t.Context(), "n1", here); err == nil {
		t.Error("an agent of a CA that is no longer trusted was heard")
	}
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func replace(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Who looks at the page reads why an agent is not heard, and what to look at, in words.
func TestWhyAnAgentIsNotHeardIsSaidInWords(t *testing.T) {
	ca, another := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	ca.write(dir, ca.pair(x509.ExtKeyUsageClientAuth, "egret-crdsync"))
	deaf := newAsked(t, ca.pair(x509.ExtKeyUsageServerAuth, "n1"), another)
	well := newAsked(t, ca.pair(x509.ExtKeyUsageServerAuth, "n1"), ca)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // whom nobody answers
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	closed := port.Hold(t)
	for name, tt := range map[string]struct {
		port int
		node string
		want string
	}{
		"no agent":                     {closed, "n1", fmt.Sprintf("nobody answers at 127.0.0.1:%d: the agent of node n1 is down, or has no --metrics-address there", closed)},
		"an agent that is busy":        {silent.Addr().(*net.TCPAddr).Port, "n1", "the node is down, a firewall is between, or it is busy"},
		"an agent of other clients":    {deaf.port, "n1", "does not take the certificate of --agents-cert-file"},
		"the agent of another node":    {well.port, "n2", "another node's agent answers at 127.0.0.1"},
		"a node without a known agent": {well.port, "", "has no address in its record"},
	} {
		addresses := here
		if tt.node == "" {
			addresses = nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if name == "an agent that is busy" {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
		}
		_, err := trafficOf(t, tt.port, dir, "")(ctx, tt.node, addresses)
		cancel()
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "Get \"") {
			t.Errorf("%s: %v; want %q", name, err, tt.want)
		}
	}
}

// An attempt: with the certificate by which crdsync's page asks for traces, somebody asks who spoke with whom.
func TestThePageAsksForKernelsByANameForTracesAlone(t *testing.T) {
	ca := newAuthority(t)
	at := port.Hold(t)
	remote(t, ca, "n1", "127.0.0.11", at, &egress.Kernel{Node: "n1", Permit: 7})
	q := egress.KernelQuestion{IP: netip.MustParseAddr("203.0.113.5"), ID: 5}.Query()
	of := map[string]url.Values{agent.KernelPage: q, agent.ConnectionsPage: {"ip": {"203.0.113.5"}, "port": {"2048"}}}
	for name, tt := range map[string]struct {
		ca         authority
		shows      string
		node, page string
		want       string // in the error; empty: there is none
	}{
		"a kernel":                          {ca, "egret-crdsync", "n1", agent.KernelPage, ""},
		"connections":                       {ca, "egret-crdsync", "n1", agent.ConnectionsPage, "none of --who-clients"},
		"a kernel, by who reads metrics":    {ca, "prometheus", "n1", agent.KernelPage, "none of --who-clients and --trace-clients"},
		"a kernel, by a name of another CA": {newAuthority(t), "egret-crdsync", "n1", agent.KernelPage, "does not take the certificate of --agents-cert-file"},
		"where another node's agent is":     {ca, "egret-crdsync", "n2", agent.KernelPage, "another node's agent answers at 127.0.0.11"},
	} {
		dir := t.TempDir()
		ca.write(dir, tt.ca.pair(x509.ExtKeyUsageClientAuth, tt.shows))
		f := agentsFlags{port: at, files: monitor.ClientTLS{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key")}}
		agents, err := f.forPage(nil)
		if err != nil {
			t.Fatal(err)
		}
		var k egress.Kernel
		err = agents.Kernels.Ask(t.Context(), tt.node, []netip.Addr{netip.MustParseAddr("127.0.0.11")}, tt.page, of[tt.page], &k)
		if tt.want == "" && (err != nil || k.Permit != 7) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, operator.ErrNoWay)) {
			t.Errorf("%s: %+v, %v; want %q", name, k, err, tt.want)
		}
	}
}

// A node that never ends its answer costs crdsync no more than what an answer has.
func TestAnAnswerAboutTrafficIsReadToItsMost(t *testing.T) {
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}))
	t.Cleanup(endless.Close)
	client := http.Client{Transport: limited{&http.Transport{DisableKeepAlives: true}, maxTrafficAnswer}}
	resp, err := client.Get(endless.URL)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if len(b) != maxTrafficAnswer || err != nil {
		t.Errorf("%d bytes, %v; want %d", len(b), err, maxTrafficAnswer)
	}
	resp.Body.Close()
	ips := map[netip.Addr]egress.Traffic{}
	for ip := netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:f000"); len(ips) < egress.MaxTraffic; ip = ip.Next() {
		ips[ip] = egress.Traffic{SentPackets: 1 << 62, SentBytes: 1 << 62, ReceivedPackets: 1 << 62, ReceivedBytes: 1 << 62}
	}
	if b, err := json.Marshal(egress.NodeTraffic{Node: strings.Repeat("n", 253), IPs: ips}); err != nil || len(b) > maxTrafficAnswer {
		t.Errorf("a whole answer has %d bytes, %v; want %d at most", len(b), err, maxTrafficAnswer)
	}
}
