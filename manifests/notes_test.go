package manifests

import (
	"strings"
	"testing"
)

// What helm install says: what to do next, and what is not safe with the values that were given.
func TestHelmInstallTellsWhatIsNextAndWhatIsNotSafe(t *testing.T) {
	t.Parallel()
	const (
		next      = "rollout status daemonset/egret-agent"
		plain     = "UNSAFE: etcd.tls.enabled=false"
		roles     = "egret etcd-rbac"
		secrets   = "create secret generic egret-etcd-agent"
		gossip    = "with the key of the agents' gossip"
		member    = "rollout status statefulset/egret-etcd"
		stays     = "let 3 nodes, and no more, be"
		one       = "etcd.bundled.replicas=1"
		snapshots = "/var/lib/egret-etcd/snapshots"
		none      = "etcd.bundled.snapshots.schedule is empty"
		restore   = "--set etcd.bundled.restoreFrom="
		anybody   = "webhook.clients.names is empty"
		unchecked = "webhook.enabled=false"
		unseen    = "There is no monitoring:"
		half      = "There is no monitoring of crdsync:"
		alone     = "crdsync.replicas=1"
		root      = "agent.privileged=true"
		log       = "agent.natLog.hostPath is empty"
	)
	all := []string{next, plain, roles, secrets, gossip, member, stays, one, snapshots, none, restore, anybody, unchecked, unseen, half, alone, root, log}
	variants := map[string]string{
		"monitored":                      ownEtcd + "agent: {config: {metrics-address: \"10.0.0.1:8481\"}}\ncrdsync: {config: {metrics-address: \"10.0.0.1:8482\"}}",
		"agents monitored":               ownEtcd + "agent: {config: {metrics-address: \"10.0.0.1:8481\"}}",
		"as it comes":                    variants["as it comes"],
		"bare":                           variants["bare"],
		"without TLS":                    variants["without TLS"],
		"bundled etcd":                   variants["bundled etcd"],
		"bundled etcd on volumes":        variants["bundled etcd on volumes"],
		"bundled etcd without roles":     variants["bundled etcd without roles"],
		"bundled etcd restored":          variants["bundled etcd restored"],
		"metrics":                        variants["metrics"],
		"webhook for API servers":        variants["webhook for API servers"],
		"NAT log":                        variants["NAT log"],
		"NAT log to the standard output": variants["NAT log to the standard output"],
		"all said":                       variants["all said"],
	}
	for name, want := range map[string][]string{
		"as it comes":                    {next, roles, secrets, anybody, unseen},
		"bare":                           {next, roles, secrets, unchecked, unseen, alone, root},
		"without TLS":                    {next, plain, anybody, unseen},
		"bundled etcd":                   {next, member, stays, snapshots, anybody, unseen},
		"bundled etcd on volumes":        {next, member, one, none, anybody, unseen},
		"bundled etcd without roles":     {next, roles, member, stays, snapshots, anybody, unseen},
		"bundled etcd restored":          {next, member, stays, snapshots, restore, anybody, unseen},
		"metrics":                        {next, roles, secrets, anybody},
		"webhook for API servers":        {next, roles, secrets, unseen},
		"monitored":                      {next, roles, secrets, anybody},
		"agents monitored":               {next, roles, secrets, anybody, half},
		"NAT log":                        {next, roles, secrets, anybody, unseen},
		"NAT log to the standard output": {next, roles, secrets, anybody, unseen, log},
		"all said":                       {next, roles, secrets, gossip, anybody, unseen},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			said, err := render(t, variants[name], "-notes", "-namespace", "mine")
			if err != nil {
				t.Fatal(err)
			}
			for _, text := range all {
				wanted := false
				for _, w := range want {
					wanted = wanted || w == text
				}
				if strings.Contains(said, text) != wanted {
					t.Errorf("it says %q: %v, want %v:\n%s", text, !wanted, wanted, said)
				}
			}
			for line := range strings.Lines(said) {
				if len(line) > 160 || strings.Contains(line, "{{") || strings.Contains(line, "<no value>") || strings.Contains(line, "egret-system") {
					t.Errorf("a line of it is %q", line)
				}
			}
		})
	}
}
