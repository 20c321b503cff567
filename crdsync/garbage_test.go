package crdsync

import (
	"errors"
	"fmt"
	"path"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// wantDependents waits until the pins, cordons and histories that etcd has are these keys.
func (c *cluster) wantDependents(want ...string) {
	c.Helper()
	for _, pattern := range []string{"pins/*", "cordons/*", "history/*/*"} {
		of := map[string]string{}
		for _, key := range want {
			if ok, err := path.Match(pattern, key); err == nil && ok {
				of[key] = "{}"
			}
		}
		c.wantRecords(pattern, of)
	}
}

func testDependents(c *cluster) {
	c.run(c.kube)
	c.node("node-1", "192.0.2.1")
	c.node("node-2", "192.0.2.2")
	c.pool("one", "10.10.0.1-10.10.0.1")
	c.pool("many", "10.10.0.11-10.10.0.19")
	c.egress("a", "externalIPPool: one")
	c.egress("b", "externalIPPool: many")
	c.wantEgresses("a", "10.10.0.1/1", "b", "10.10.0.11/2")
	none := struct{}{}
	// 10.10.0.1 is the beginning of 10.10.0.11.
	for _, key := range []string{"pins/10.10.0.1", "pins/10.10.0.11", "history/10.10.0.1/1-node-1", "history/10.10.0.1/2-node-2", "history/10.10.0.11/1-node-1",
		"cordons/node-1", "cordons/node-2"} {
		c.put(key, none)
	}
	c.put(store.OwnerKey(ip("10.10.0.1")), egress.Owner{IP: ip("10.10.0.1"), Node: "node-1"})

	c.remove("Egress", "a")
	c.wantDependents("pins/10.10.0.11", "history/10.10.0.11/1-node-1", "cordons/node-1", "cordons/node-2")
	// The owner gives the IP up later, and says so.
	c.put("history/10.10.0.1/3-node-1", none)
	if _, err := c.store.Etcd().Delete(c.Context(), c.store.Prefix()+store.OwnerKey(ip("10.10.0.1"))); err != nil {
		c.Fatal(err)
	}
	c.wantDependents("pins/10.10.0.11", "history/10.10.0.11/1-node-1", "cordons/node-1", "cordons/node-2")
	// Whatever is there all the same, the next one to have the IP does not get it.
	c.put("pins/10.10.0.1", none)
	c.put("history/10.10.0.1/4-node-1", none)
	c.egress("c", "externalIPPool: one")
	c.wantEgresses("b", "10.10.0.11/2", "c", "10.10.0.1/3")
	c.wantDependents("pins/10.10.0.11", "history/10.10.0.11/1-node-1", "cordons/node-1", "cordons/node-2")

	if err := c.core.CoreV1().Nodes().Delete(c.Context(), "node-1", metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.wantRecords("nodes/*", map[string]string{"nodes/node-2": "2 192.0.2.2"})
	c.wantDependents("pins/10.10.0.11", "history/10.10.0.11/1-node-1", "cordons/node-2")

	// A record that is lost is no IP that is gone, and no node: it is written again, with the next index, or with its
	// own by a pass that had read it.
	for _, key := range []string{"allocations/10.10.0.11", "nodes/node-2"} {
		if _, err := c.store.Etcd().Delete(c.Context(), c.store.Prefix()+key); err != nil {
			c.Fatal(err)
		}
	}
	c.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.11": "many/2 b", "allocations/10.10.0.1": "one/3 c"})
	c.eventually(func() error {
		values, _ := c.records()
		value, ok := values["nodes/node-2"]
		if !ok {
			return errors.New("nodes/node-2 is not there")
		}
		if got := c.describe("nodes/node-2", value); got != "2 192.0.2.2" && got != "3 192.0.2.2" {
			return fmt.Errorf("nodes/node-2: got %q, want index 2 or 3", got)
		}
		return nil
	})
	c.wantDependents("pins/10.10.0.11", "history/10.10.0.11/1-node-1", "cordons/node-2")
}

func testGarbage(c *cluster) {
	stop := c.run(c.kube)
	c.node("node-1", "192.0.2.1")
	c.pool("one", "10.10.0.1-10.10.0.3")
	c.egress("a", "externalIPPool: one")
	c.wantEgresses("a", "10.10.0.1/1")
	stop()
	none := struct{}{}
	for _, key := range []string{"pins/10.10.0.1", "pins/10.10.0.2", "history/10.10.0.1/1-node-1", "history/10.10.0.2/1-node-2", "history/10.10.0.2/2-node-2",
		"history/nonsense/1", "cordons/node-1", "cordons/node-2"} {
		c.put(key, none)
	}
	// Those that are there are missing from etcd when the next leader begins.
	for _, key := range []string{"allocations/10.10.0.1", "nodes/node-1"} {
		if _, err := c.store.Etcd().Delete(c.Context(), c.store.Prefix()+key); err != nil {
			c.Fatal(err)
		}
	}
	c.run(c.kube)
	c.wantDependents("pins/10.10.0.1", "history/10.10.0.1/1-node-1", "history/nonsense/1", "cordons/node-1")
	<-time.After(300 * time.Millisecond) // for it to take away what it must not
	c.wantDependents("pins/10.10.0.1", "history/10.10.0.1/1-node-1", "history/nonsense/1", "cordons/node-1")
}
