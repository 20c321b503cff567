package main

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/ec2test"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

func TestTheCommandAssignsWithCredentialsOfTheEnvironment(t *testing.T) {
	ec2, etcd := ec2test.New(t), etcdtest.New(t)
	who, err := ec2test.Credentials.Retrieve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", who.AccessKeyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", who.SecretAccessKey)
	t.Setenv("AWS_SESSION_TOKEN", "")
	ec2.Add("eni-1", 1, "10.0.0.1")
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcd.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ip := netip.MustParseAddr("10.0.0.50")
	for key, v := range map[string]any{
		store.NodeKey("n"):          egress.Node{Name: "n", Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		store.AllocationKey(ip):     egress.Allocation{IP: ip, Pool: "p", ID: 1},
		store.OwnerKey(ip):          egress.Owner{IP: ip, Node: "n", Why: egress.ReasonClaim},
		store.PoolKey("everywhere"): egress.Pool{Name: "everywhere"},
	} {
		b, err := store.Encode(v)
		if err == nil {
			_, err = client.Etcd().Put(t.Context(), client.Prefix()+key, string(b))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	c := root()
	c.SetArgs([]string{"cloud", "aws", "--region", ec2test.Region, "--vpc", ec2test.VPC, "--endpoint-url", ec2.URL, "--endpoints", etcd.Endpoint(), "--insecure", "--status-address", ""})
	ended := make(chan error, 1)
	go func() { ended <- c.ExecuteContext(ctx) }()
	for end := time.Now().Add(30 * time.Second); ec2.Holder(ip) != "eni-1"; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Error("the owner's interface does not get the address within 30 s")
			break
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("told to stop, it ends with %v", err)
	}
}

func TestFaultyOptionsOfTheCloudAreRefusedTogether(t *testing.T) {
	c := root()
	c.SetArgs([]string{"cloud", "aws", "--election-ttl", "1s", "--check-interval", "10ms", "--status-address", "0.0.0.0:1"})
	err := c.ExecuteContext(t.Context())
	for _, want := range []string{"--election-ttl", "--check-interval", "--status-address", "--insecure for a trial"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one that names %s", err, want)
		}
	}
}
