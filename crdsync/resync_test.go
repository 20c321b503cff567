package crdsync

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/store"
)

// testResync: what everything is compared for is found, and as long as nothing differs, no pod's event waits for all
// egresses.
func testResync(c *cluster) {
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	kube := rest.CopyConfig(c.kube)
	kube.Timeout = 0
	cache := c.store.NewCache(prefixes...)
	cache.Track()
	lead, err := c.store.Campaign(ctx, store.CrdsyncElection, "test", 10*time.Second)
	if err != nil {
		c.Fatal(err)
	}
	d := newDirty()
	src, err := newSource(ctx, kube, nodeDefaults{}, d, func(string, string) {})
	if err != nil {
		c.Fatal(err)
	}
	go src.run(ctx)
	go func() { _ = cache.Run(ctx) }() // says that ctx ended
	src.synced(ctx)
	<-cache.Ready()
	m := &mirror{source: src, cache: cache, lead: lead, dirty: d, publish: func(control) {}, log: slog.New(slog.DiscardHandler)}
	m.begin()
	pass := func(w work) {
		c.Helper()
		c.eventually(func() error { return m.pass(ctx, &w) }) // the cache may be behind
	}
	unheard := func(pods int) {
		c.Helper()
		c.eventually(func() error {
			if len(src.podsBy(byNode, "node-1")) < pods || len(src.egresses.GetIndexer().ListKeys()) < 2 || len(src.pools.GetIndexer().ListKeys()) == 0 {
				return fmt.Errorf("the informers are behind")
			}
			return nil
		})
		time.Sleep(100 * time.Millisecond) // the handlers are called after that
		d.take()
	}
	pass(work{objects: true})
	c.example()
	c.pod("prod", "web", "node-1", "10.244.1.1", "web")
	unheard(1)
	m.compareAll(ctx)
	w := d.take()
	if !w.objects {
		c.Fatalf("work %+v: want that all is looked at, as two egresses are not in etcd", w)
	}
	pass(w)
	want := map[string]string{"members/by-node/node-1/egress-prod-web": "prod/web=10.244.1.1"}
	c.wantRecords("members/by-node/*/*", want)

	c.pod("prod", "db", "node-1", "10.244.1.2", "db")
	unheard(2)
	c.eventually(func() error {
		m.compareAll(ctx)
		if w = d.take(); w.objects { // the cache may be behind
			return fmt.Errorf("something differs")
		}
		return nil
	})
	if w.nodes || w.records || !w.pods["node-1"] {
		c.Errorf("work %+v: want the pods, a node at a time, and nothing that is about all egresses", w)
	}
	pass(w)
	want["members/by-node/node-1/-"] = "prod/db=10.244.1.2"
	c.wantRecords("members/by-node/*/*", want)
}
