package main

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

// records puts records into an etcd.
func records(t *testing.T, c *store.Client, all map[string]any) {
	t.Helper()
	for key, record := range all {
		value, err := store.Encode(record)
		if text, ok := record.(string); ok {
			value = []byte(text)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Etcd().Put(t.Context(), c.Prefix()+key, string(value)); err != nil {
			t.Fatal(err)
		}
	}
}

// dialed returns a client of an etcd.
func dialed(t *testing.T, endpoint, prefix string) *store.Client {
	t.Helper()
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{endpoint}, Prefix: prefix})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// completed returns what `egret __complete` offers.
func completed(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := run(t, append([]string{cobra.ShellCompRequestCmd}, args...)...)
	if err != nil {
		t.Errorf("completing %q: %v", args, err)
	}
	offered, directive, _ := strings.Cut(out, "\n:")
	if !strings.HasPrefix(out, ":") && !strings.HasPrefix(directive, "4\n") || strings.HasPrefix(out, ":") && !strings.HasPrefix(out, ":4\n") {
		t.Errorf("completing %q: %q, want that no files are offered", args, out)
	}
	if strings.HasPrefix(out, ":") {
		return nil
	}
	return strings.Split(offered, "\n")
}

func TestCompletionOffersWhatThereIs(t *testing.T) {
	server := etcdtest.New(t)
	c := dialed(t, server.Endpoint(), "/other/")
	pooled, static, six := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.101"), netip.MustParseAddr("fd10::")
	evil := "$(reboot)"
	records(t, c, map[string]any{
		store.NodeKey("node-1"):               egress.Node{Name: "node-1", Index: 1},
		store.NodeKey("node-2"):               egress.Node{Name: "node-2", Index: 2},
		store.NodeKey(evil):                   egress.Node{Name: evil, Index: 3},
		store.NodeKey("a`b"):                  egress.Node{Name: "a`b", Index: 4},
		store.CordonKey("node-2"):             egress.Cordon{Node: "node-2"},
		store.EgressKey("web"):                egress.Policy{Name: "web"},
		store.PoolKey("public"):               egress.Pool{Name: "public"},
		store.AllocationKey(pooled):           egress.Allocation{IP: pooled, Pool: "public", ID: 1},
		store.AllocationKey(six):              egress.Allocation{IP: six, Pool: "public", ID: 3},
		store.AllocationKey(static):           egress.Allocation{IP: static, ID: 2},
		store.PinKey(pooled):                  egress.Pin{IP: pooled, Node: "node-1"},
		store.MembersByNodeKey("n", "-"):      egress.Members{Egress: "-", Node: "n", Pods: []egress.Member{{Pod: "prod/db-1"}}},
		store.MembersByNodeKey("n", "web"):    egress.Members{Egress: "web", Node: "n", Pods: []egress.Member{{Pod: "prod/web-1"}, {Pod: "prod/x;y"}}},
		store.MembersByNodeKey("n", "broken"): "no JSON",
	})
	at := []string{"--endpoints", server.Endpoint(), "--etcd-prefix", "/other"}
	for _, tt := range []struct{ line, want string }{
		{"drain|", "node-1 node-2"},
		{"cordon|node-2", "node-2"},
		{"cordon|x", ""},
		{"drain|node-1|", ""},
		{"uncordon|", "node-2"},
		{"move|10.", "10.10.0.11"},
		{"move|10.10.0.11|--to|", "node-1 node-2"},
		{"move|--to|node-2|", "10.10.0.11 fd10::"},
		{"unpin|", "10.10.0.11"},
		{"history|10", "10.10.0.101 10.10.0.11"},
		{"trace|", "prod/db-1 prod/web-1"},
		{"trace|prod/w", "prod/web-1"},
		{"describe|", "egress ip node pod pool"},
		{"describe|egress|", "web"},
		{"describe|pool|", "public"},
		{"describe|pod|prod/d", "prod/db-1"},
		{"describe|birds|", ""},
		{"get|no", "nodes"},
		{"get|blocks|", "10.10.0.11 fd10::"},
		{"get|nodes|", ""},
		{"get|nodes|-o|j", "json jsonpath="},
		{"status|-o|", "json yaml"},
	} {
		line := strings.Split(tt.line, "|")
		args := append([]string{line[0]}, append(at, line[1:]...)...)
		if got := strings.Join(completed(t, args...), " "); got != tt.want {
			t.Errorf("%s: %q, want %q", strings.ReplaceAll(tt.line, "|", " "), got, tt.want)
		}
	}
	t.Run("by the environment", func(t *testing.T) {
		t.Setenv("ETCDCTL_ENDPOINTS", server.Endpoint())
		t.Setenv("EGRET_ETCD_PREFIX", "/other/")
		if got := strings.Join(completed(t, "drain", ""), " "); got != "node-1 node-2" {
			t.Errorf("%q", got)
		}
	})
}

// A person who presses the key waits for no etcd, and reads no error on the line that he is writing.
func TestCompletionIsSilentAndSoonOverWithoutEtcd(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // it takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for name, args := range map[string][]string{
		"nobody listens":        {"--endpoints", "127.0.0.1:1"},
		"nobody answers":        {"--endpoints", silent.Addr().String()},
		"no such file":          {"--cacert", "/nowhere"},
		"no endpoint":           {"--endpoints", ""},
		"a longer dial timeout": {"--endpoints", "127.0.0.1:1", "--dial-timeout", "1m"},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			if got := completed(t, append(append([]string{"drain"}, args...), "")...); got != nil {
				t.Errorf("offered %q", got)
			}
			if took := time.Since(began); took > 15*time.Second { // 1.5 s on a machine that has time
				t.Errorf("took %v", took)
			}
		})
	}
}

func TestKubectlAsksForCompletionsByAnotherName(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"/usr/bin/egret get nodes", "get nodes"},
		{"/usr/bin/kubectl-egret get nodes", "get nodes"},
		{"/usr/bin/kubectl_complete-egret get no", "__complete get no"},
	} {
		if got := strings.Join(arguments(strings.Fields(tt.args)), " "); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.args, got, tt.want)
		}
	}
}
