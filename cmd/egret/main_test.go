package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/cmd/egret/config"
	"github.com/egret-project/egret/internal/etcdtest"
)

// run runs the command as main does and returns what it printed, and its error.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	c := root()
	c.SetArgs(args)
	c.SetOut(&out)
	c.SetErr(&out)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

func TestBadInputIsNamed(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tests := map[string]struct {
		args []string
		want []string // each has to be in the error
	}{
		"unknown command":             {[]string{"fly"}, []string{"fly"}},
		"unknown flag":                {[]string{"agent", "--wings=2"}, []string{"wings", "`egret agent --help`"}},
		"kind":                        {[]string{"get", "birds"}, []string{"birds"}},
		"output format":               {[]string{"get", "owners", "-o", "xml", "--endpoints", "127.0.0.1:1", "--dial-timeout", "100ms"}, []string{"xml", "json"}},
		"no IP to move":               {[]string{"move", "--to", "node-1"}, []string{"arg", "`egret move IP"}},
		"not an IP":                   {[]string{"move", "ten.ten", "--to", "node-1"}, []string{"ten.ten", "IPv4"}},
		"not an IP to unpin":          {[]string{"unpin", "ten.ten"}, []string{"ten.ten", "IPv4"}},
		"history of no IP":            {[]string{"history", "ten.ten"}, []string{"ten.ten", "IPv4"}},
		"history's format":            {[]string{"history", "10.0.0.1", "-o", "xml"}, []string{"xml", "json"}},
		"no node to drain":            {[]string{"drain"}, []string{"arg", "`egret drain NODE"}},
		"a word too many":             {[]string{"status", "node-1"}, []string{"node-1", "`egret status"}},
		"drain timeout":               {[]string{"drain", "node-1", "--wait", "--timeout", "0s"}, []string{"--timeout"}},
		"capacity":                    {[]string{"crdsync", "--egress.maxEgressIPsPerNode", "256"}, []string{"256", "1 to 255"}},
		"block size no power":         {[]string{"crdsync", "--block-size", "1000", "--election-ttl", "1s"}, []string{"--block-size 1000", "power of two from 64 to 32768", "--election-ttl"}},
		"block size too small":        {[]string{"crdsync", "--block-size", "32"}, []string{"--block-size 32", "64 to 32768"}},
		"block size too large":        {[]string{"crdsync", "--block-size", "65536"}, []string{"--block-size 65536", "64 to 32768"}},
		"block size negative":         {[]string{"crdsync", "--block-size=-64"}, []string{"--block-size -64"}},
		"blocks of no IP":             {[]string{"get", "blocks", "ten.ten"}, []string{"ten.ten", "IPv4"}},
		"one of a kind":               {[]string{"get", "nodes", "node-1"}, []string{"nodes node-1", "blocks", "`egret describe`"}},
		"an IP of another kind":       {[]string{"get", "owners", "10.0.0.1"}, []string{"owners", "blocks"}},
		"no target":                   {[]string{"move", "10.0.0.1"}, []string{"to"}},
		"timeout":                     {[]string{"move", "10.0.0.1", "--to", "a", "--timeout", "1ms"}, []string{"--timeout", "1ms", "2s"}},
		"duration":                    {[]string{"agent", "--lease-ttl", "soon"}, []string{"lease-ttl", "soon"}},
		"lease too short":             {[]string{"agent", "--lease-ttl", "1s"}, []string{"--lease-ttl", "1s", "2s"}},
		"permit too long":             {[]string{"agent", "--lease-ttl", "2m", "--permit", "61s"}, []string{"--permit 1m1s", "--lease-ttl", "1m0s"}},
		"every fault at once":         {[]string{"agent", "--lease-ttl", "1s", "--node-ip", "x", "--rebalance", "always", "--egress.exceptCIDRs", "10.0.0.0", "--log-level", "loud"}, []string{"--lease-ttl", "--node-ip", "always", "10.0.0.0", "loud"}},
		"no node":                     {[]string{"agent", "--node", ""}, []string{"--node"}},
		"config file missing":         {[]string{"agent", "--config", filepath.Join(dir, "none")}, []string{"--config", "none"}},
		"config file unreadable":      {[]string{"agent", "--config", file("broken", "a: [")}, []string{"broken"}},
		"config option unknown":       {[]string{"agent", "--config", file("unknown", "wings: 2")}, []string{"wings"}},
		"config option unknown below": {[]string{"agent", "--config", file("below", "egress: {wings: [2]}")}, []string{"below", "egress.wings"}},
		"config option twice":         {[]string{"agent", "--config", file("twice", "egress: {exceptCIDRs: []}\negress.exceptCIDRs: []")}, []string{"twice", "egress.exceptCIDRs"}},
		"config value malformed":      {[]string{"agent", "--config", file("value", "lease-ttl: soon")}, []string{"lease-ttl", "soon"}},
		"CA file missing":             {[]string{"get", "owners", "--cacert", filepath.Join(dir, "ca")}, []string{"--cacert", "ca"}},
		"CA file without content":     {[]string{"get", "owners", "--cacert", file("empty.crt", "")}, []string{"--cacert", "empty.crt", "PEM"}},
		"certificate without key":     {[]string{"get", "owners", "--cert", "x"}, []string{"--cert", "--key"}},
		"election TTL":                {[]string{"crdsync", "--election-ttl", "1500ms"}, []string{"--election-ttl", "1.5s"}},
		"agent without TLS":           {[]string{"agent", "--endpoints", "http://10.0.0.1:2379", "--lease-ttl", "1s"}, []string{"http://10.0.0.1:2379 without TLS", "--insecure", "--lease-ttl"}},
		"crdsync without TLS":         {[]string{"crdsync", "--endpoints", "http://10.0.0.1:2379"}, []string{"http://10.0.0.1:2379 without TLS", "--insecure"}},
		"etcd of this node":           {[]string{"agent"}, []string{"127.0.0.1:2379 without TLS", "--insecure"}},
		"room made once":              {[]string{"etcd-rbac", "--apply", "--make-room"}, []string{"--make-room", "--keep"}},
		"rights taken later on":       {[]string{"etcd-rbac", "--apply", "--narrow", "--keep", "1m"}, []string{"--narrow", "--keep"}},
		"users kept without TLS":      {[]string{"etcd-rbac", "--apply", "--keep", "1m"}, []string{"127.0.0.1:2379 without TLS", "--insecure"}},
		"password in the clear":       {[]string{"get", "owners", "--user", "root:x", "--endpoints", "http://10.0.0.1:2379"}, []string{"--user root:", "in the clear", "--insecure"}},
		"kubeconfig missing":          {[]string{"crdsync", "--insecure", "--kubeconfig", filepath.Join(dir, "kube")}, []string{"--kubeconfig", "kube"}},
		"status for the world":        {[]string{"agent", "--status-address", "0.0.0.0:8481", "--lease-ttl", "1s"}, []string{"--status-address", "loopback", "--lease-ttl"}},
		"metrics without TLS":         {[]string{"crdsync", "--metrics-address", "10.0.0.1:8482"}, []string{"--metrics-address", "--metrics-client-ca-file"}},
		"page for the world":          {[]string{"page", "--address", "0.0.0.0:8487"}, []string{"--address", "loopback"}},
		"crdsync's page for others":   {[]string{"crdsync", "--page-local-address", "10.0.0.1:8487"}, []string{"--page-local-address", "--page-address"}},
		"page without TLS":            {[]string{"crdsync", "--page-address", "10.0.0.1:8487"}, []string{"--page-address", "--page-cert-file"}},
		"agents without certificates": {[]string{"page", "--agents-port", "8481"}, []string{"--agents-ca-file", "want all of them"}},
		"agents, and no page":         {[]string{"crdsync", "--agents-port", "8481"}, []string{"--agents-port", "want all of them"}},
		"page at one port twice":      {[]string{"crdsync", "--page-address", "0.0.0.0:8487", "--page-local-address", "127.0.0.1:8487"}, []string{"--page-address", "another port"}},
		"page's clients without a CA": {[]string{"crdsync", "--page-address", "10.0.0.1:8487", "--page-clients", "ann"}, []string{"--page-clients", "--page-client-ca-file"}},
		"jsonpath unreadable":         {[]string{"get", "nodes", "-o", "jsonpath={.items[}"}, []string{"jsonpath", "{.items[}"}},
		"events of no watch":          {[]string{"get", "nodes", "--output-watch-events"}, []string{"--output-watch-events", "--watch"}},
		"watch as nothing":            {[]string{"get", "nodes", "-w", "-o", "xml"}, []string{"xml", "wide", "jsonpath"}},
		"status as a name":            {[]string{"status", "-w", "-o", "name"}, []string{"name", "json or yaml"}},
		"trace as a name":             {[]string{"trace", "prod/web-1", "-o", "name"}, []string{"name", "json or yaml"}},
		"who as a name":               {[]string{"who", "203.0.113.5:41012", "-o", "name"}, []string{"name", "json or yaml"}},
		"watch of birds":              {[]string{"describe", "birds", "a", "-w"}, []string{"birds", "egress, ip, node, pod, pool"}},
		"describe of a kind":          {[]string{"describe", "birds", "a"}, []string{"birds", "egress, ip, node, pod, pool"}},
		"describe of no IP":           {[]string{"describe", "ip", "ten.ten"}, []string{"ten.ten", "IPv4"}},
		"trace of no pod":             {[]string{"trace", "web-1"}, []string{"web-1", "namespace/name"}},
		"trace to no address":         {[]string{"trace", "prod/web-1", "--to", "home"}, []string{"--to", "home", "IPv4"}},
		"trace to a loopback address": {[]string{"trace", "prod/web-1", "--to", "127.0.0.1"}, []string{"--to 127.0.0.1", "want a global unicast address"}},
		"trace to a link's address":   {[]string{"trace", "prod/web-1", "--to", "fe80::1%eth0"}, []string{"--to fe80::1%eth0", "without a zone"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, tt.args...)
			if err == nil {
				t.Fatalf("no error; it printed %q", out)
			}
			for _, part := range tt.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
}

func TestWhatAnErrorQuotesCommandsNoTerminal(t *testing.T) {
	var out bytes.Buffer
	complain(&out, errors.Join(errors.New("record x\x1b]0;y\x07 could not be read"), errors.New("\tno\rsuch")))
	if out.String() != "egret: record x?]0;y? could not be read\n\tno?such\n" {
		t.Errorf("%q", out.String())
	}
}

// The layout of antrea-agent.conf, and that of a list of flags.
func TestConfigFileIsUnderstoodInBothLayouts(t *testing.T) {
	for _, body := range []string{
		"egress:\n  exceptCIDRs: [10.1.0.0/16, 10.2.0.0/16]\n  snatFullyRandomPorts: true\ngossip-port: 65000\nlease-ttl: 7s\n",
		"egress.exceptCIDRs: [10.1.0.0/16, 10.2.0.0/16]\negress.snatFullyRandomPorts: true\ngossip-port: 65000\nlease-ttl: 7s\n",
	} {
		file := filepath.Join(t.TempDir(), "egret-agent.conf")
		if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		s := agentCommand().Flags()
		if err := s.Set("lease-ttl", "9s"); err != nil { // the command line wins
			t.Fatal(err)
		}
		if err := config.Set(s, file); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{
			"egress.exceptCIDRs": "[10.1.0.0/16,10.2.0.0/16]", "egress.snatFullyRandomPorts": "true", "gossip-port": "65000", "lease-ttl": "9s",
		} {
			if got := s.Lookup(name).Value.String(); got != want {
				t.Errorf("%s is %s with %q, want %s", name, got, body, want)
			}
		}
	}
}

func TestDestinationsOfBothFlagsAreExcepted(t *testing.T) {
	f := agentFlags{
		node: "node-1", leaseTTL: 10 * time.Second, permit: time.Second, rebalance: "off", holdDown: time.Minute, onStoreLoss: "freeze",
		etcd:   etcdFlags{insecure: true},
		except: []string{"192.168.0.0/16"}, cluster: []string{"10.244.7.9/16", "fd44::/16"},
	}
	cfg, err := f.validate()
	want := "[192.168.0.0/16] [10.244.0.0/16 fd44::/16]"
	if got := fmt.Sprint(cfg.Except, cfg.Cluster); err != nil || got != want {
		t.Errorf("excepted are %s, %v; want %s", got, err, want)
	}
}

func TestUnreachableEtcdIsNamed(t *testing.T) {
	for name, args := range map[string][]string{
		"get":     {"get", "owners"},
		"move":    {"move", "10.0.0.1", "--to", "node-1"},
		"drain":   {"drain", "node-1"},
		"history": {"history", "10.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := run(t, append(args, "--endpoints", "127.0.0.1:1", "--dial-timeout", "300ms")...)
			if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") || !strings.Contains(err.Error(), "--endpoints") {
				t.Errorf("error %v: want one that names endpoint and flag", err)
			}
		})
	}
}

// Agent and crdsync may start before etcd does.
func TestWhatRunsForGoodWaitsForEtcd(t *testing.T) {
	server := etcdtest.New(t)
	server.Stop()
	said := make(chan string, 100)
	log := slog.New(slog.NewTextHandler(writer(func(line string) { said <- line }), nil))
	flags := etcdFlags{endpoints: []string{server.Endpoint()}, dialTimeout: 200 * time.Millisecond}
	connected := make(chan error, 1)
	go func() {
		client, err := flags.await(t.Context(), log)
		if err == nil {
			err = client.Close()
		}
		connected <- err
	}()
	if line := <-said; !strings.Contains(line, server.Endpoint()) || !strings.Contains(line, "--endpoints") {
		t.Errorf("log %q: want endpoint and flag in it", line)
	}
	time.Sleep(time.Second)
	server.Start()
	if err := <-connected; err != nil {
		t.Error(err)
	}
	if n := len(said); n > 0 {
		t.Errorf("said %d times more", n)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := flags.await(ended, log); err == nil {
		t.Error("went on when it was over")
	}
}

type writer func(line string)

func (w writer) Write(b []byte) (int, error) {
	w(string(b))
	return len(b), nil
}

func TestEnvironmentOfEtcdctlIsUnderstood(t *testing.T) {
	t.Setenv("ETCDCTL_ENDPOINTS", "127.0.0.1:2")
	t.Setenv("ETCDCTL_DIAL_TIMEOUT", "300ms")
	if _, err := run(t, "get", "owners"); err == nil || !strings.Contains(err.Error(), "127.0.0.1:2") {
		t.Errorf("error %v: want one that names the endpoint of the environment", err)
	}
	if _, err := run(t, "get", "owners", "--endpoints", "127.0.0.1:3"); err == nil || !strings.Contains(err.Error(), "127.0.0.1:3") {
		t.Errorf("error %v: want one that names the endpoint of the flag", err)
	}
	t.Setenv("ETCDCTL_ENDPOINTS", "https://::1:2") // https://$(EGRET_ETCD_SERVICE_HOST):2, of a cluster without IPv4
	if _, err := run(t, "get", "owners"); err == nil || !strings.Contains(err.Error(), "https://[::1]:2") {
		t.Errorf("error %v: want one that names the endpoint of the environment, with brackets", err)
	}
	t.Setenv("ETCDCTL_ENDPOINTS", "https://$(EGRET_ETCD_SERVICE_HOST):8483")
	if _, err := run(t, "get", "owners"); err == nil || !strings.Contains(err.Error(), "no variable EGRET_ETCD_SERVICE_HOST") {
		t.Errorf("error %v: want one that names the variable that the kubelet did not expand", err)
	}
	t.Setenv("ETCDCTL_DIAL_TIMEOUT", "soon")
	t.Setenv("ETCDCTL_ENDPOINTS", "127.0.0.1:2")
	if _, err := run(t, "get", "owners"); err == nil || !strings.Contains(err.Error(), "ETCDCTL_DIAL_TIMEOUT") {
		t.Errorf("error %v: want one that names the variable", err)
	}
}

// A name is anybody's choice, and is printed on terminals and written into Events.
func TestWhoActsIsNamedOnOneLine(t *testing.T) {
	t.Setenv("SUDO_USER", "mal\nlory\x1b[31m"+strings.Repeat("x", 1000))
	f := etcdFlags{acts: true, user: "ops:secret"}
	by := f.by(nil, "")
	if strings.ContainsAny(by, "\n\x1b") || len(by) > 210 || !strings.HasPrefix(by, "mal?lory?[31mxxx") {
		t.Errorf("%q", by)
	}
	t.Setenv("SUDO_USER", "alice")
	if by = f.by(nil, ""); !strings.HasPrefix(by, "alice@") || !strings.HasSuffix(by, "(etcd user ops)") {
		t.Errorf("%q: want user, host and etcd's user, and no password", by)
	}
	t.Setenv("SUDO_USER", strings.Repeat("x", 1000)) // an attempt: a name that leaves no room for those that others vouch for
	if by = f.by(nil, "ann@example.org\n"); !strings.Contains(by, " (Kubernetes user ann@example.org?) (etcd user ops)") {
		t.Errorf("%q: want the user of Kubernetes", by)
	}
	if by = (&etcdFlags{}).by(nil, "ann"); by != "" {
		t.Errorf("a command that does nothing names %q", by)
	}
}
