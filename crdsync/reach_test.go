package crdsync

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/store"
)

// replica starts a replica that reaches the API server by a network of its own, and says what it is.
func (c *cluster) replica(id string) *outage {
	c.Helper()
	o := &outage{}
	kube := rest.CopyConfig(c.kube)
	kube.Dial = o.dial
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Kube: kube, Store: c.store, ID: id, ElectionTTL: 10 * time.Second, Log: c.log.With("replica", id), readPatience: 4 * time.Second})
	}()
	c.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			c.Errorf("replica %s ended: %v", id, err)
		}
	})
	return o
}

// elected returns the leader's name, and the create revision of its key.
func (c *cluster) elected() (id string, revision int64) {
	c.Helper()
	r, err := c.etcd.Client().Get(c.Context(), store.DefaultPrefix+"elections/", clientv3.WithFirstCreate()...)
	if err != nil {
		c.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return "", 0
	}
	return string(r.Kvs[0].Value), r.Kvs[0].CreateRevision
}

// testPartitioned: of two replicas the leader loses the API server, then the next one, too.
func testPartitioned(c *cluster) {
	one := c.replica("one")
	c.wantCandidates(1)
	two := c.replica("two")
	c.wantCandidates(2)
	c.example()
	c.wantRecords("egresses/*", map[string]string{"egresses/egress-prod-web": "10.10.0.11/1", "egresses/egress-staging-web": "10.10.0.12/2"})
	began := time.Now()
	one.set(true)
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantMembers("egress-prod-web", "prod/a=10.244.1.1")
	id, revision := c.elected()
	if id != "two" {
		c.Fatalf("the leader is %q", id)
	}
	c.Logf("a pod's event was written by the other replica %v after the leader lost the API server", time.Since(began))
	two.set(true) // nobody can read it now
	for end := time.Now().Add(7 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if id, now := c.elected(); id != "two" || now != revision {
			c.Fatalf("nobody can read the API server, and the leader is %q of revision %d, after %d", id, now, revision)
		}
	}
	one.set(false)
	c.pod("prod", "b", "node-1", "10.244.1.2", "web")
	c.wantMembers("egress-prod-web", "prod/a=10.244.1.1 prod/b=10.244.1.2")
	if id, _ := c.elected(); id != "one" {
		c.Errorf("the leader is %q", id)
	}
}
