package main

import (
	"context"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// completeTimeout is how long a person waits for what may be completed: then nothing is offered, and nothing is said.
const completeTimeout = 1500 * time.Millisecond

// kubectlCompletes is the name by which kubectl calls a plugin for what may come next on its command line.
const kubectlCompletes = "kubectl_complete-egret"

// arguments returns the arguments of the process, those of a completion where it is called as the program for
// kubectl's.
func arguments(args []string) []string {
	if filepath.Base(args[0]) == kubectlCompletes {
		return append([]string{cobra.ShellCompRequestCmd}, args[1:]...)
	}
	return args[1:]
}

// values are what may be completed: from etcd, as it is now.
type values func(ctx context.Context, c *store.Client) ([]string, error)

// completions add to the commands what may be completed. They are here, and not where commands are made, since cobra
// has one place for it.
func completions(root *cobra.Command) {
	first := map[string]values{
		"move": pooledIPs, "unpin": pinnedIPs, "history": ips, "who": ips, "cordon": nodes, "drain": nodes, "uncordon": cordonedNodes, "trace": pods,
	}
	described := map[string]values{"egress": names(store.EgressPrefix), "ip": ips, "node": nodes, "pod": pods, "pool": names(store.PoolPrefix)}
	for _, c := range root.Commands() {
		switch name := c.Name(); name {
		case "describe":
			c.ValidArgsFunction = func(c *cobra.Command, args []string, to string) ([]string, cobra.ShellCompDirective) {
				switch len(args) {
				case 0:
					return offer(operator.Described, to), cobra.ShellCompDirectiveNoFileComp
				case 1:
					return live(c, described[args[0]], to)
				}
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			c.ValidArgs = nil // cobra takes one of the two
		case "get":
			c.ValidArgsFunction = func(c *cobra.Command, args []string, to string) ([]string, cobra.ShellCompDirective) {
				switch {
				case len(args) == 0:
					return offer(operator.Kinds, to), cobra.ShellCompDirectiveNoFileComp
				case len(args) == 1 && args[0] == operator.KindBlocks:
					return live(c, pooledIPs, to)
				}
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			c.ValidArgs = nil
		default:
			if of := first[name]; of != nil {
				c.ValidArgsFunction = func(c *cobra.Command, args []string, to string) ([]string, cobra.ShellCompDirective) {
					if len(args) > 0 {
						return nil, cobra.ShellCompDirectiveNoFileComp
					}
					return live(c, of, to)
				}
			}
		}
		completeFlag(c, "to", map[string]values{"move": nodes}[c.Name()])
		if o := c.Flags().Lookup("output"); o != nil && c.Name() != "bundle" {
			formats := []string{"json", "yaml"}
			if c.Name() == "get" {
				formats = append(formats, "name", "wide", "jsonpath=")
			}
			_ = c.RegisterFlagCompletionFunc("output", func(_ *cobra.Command, _ []string, to string) ([]string, cobra.ShellCompDirective) {
				return offer(formats, to), cobra.ShellCompDirectiveNoFileComp
			}) // it fails for a flag that is not there
		}
	}
}

// completeFlag has a flag of a command completed, where it has that one and there are values for it.
func completeFlag(c *cobra.Command, name string, of values) {
	if of == nil || c.Flags().Lookup(name) == nil {
		return
	}
	_ = c.RegisterFlagCompletionFunc(name, func(c *cobra.Command, _ []string, to string) ([]string, cobra.ShellCompDirective) {
		return live(c, of, to)
	}) // it fails for a flag that is not there
}

// live asks etcd, by the flags that are there already and by the environment. Where it does not answer at once nothing
// is offered.
func live(c *cobra.Command, of values, to string) ([]string, cobra.ShellCompDirective) {
	const nothing = cobra.ShellCompDirectiveNoFileComp
	if of == nil {
		return nil, nothing
	}
	var etcd etcdFlags
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	etcd.addOperator(own)
	own.VisitAll(func(f *pflag.Flag) {
		given := c.Flags().Lookup(f.Name)
		if given == nil || !given.Changed {
			return
		}
		f.Changed = true
		if list, ok := given.Value.(pflag.SliceValue); ok {
			_ = f.Value.(pflag.SliceValue).Replace(list.GetSlice()) // of one type
			return
		}
		_ = f.Value.Set(given.Value.String()) // it was taken once
	})
	if err := fromEnvironment(own); err != nil {
		return nil, nothing
	}
	etcd.dialTimeout = min(etcd.dialTimeout, completeTimeout)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(contextOf(c)), completeTimeout)
	defer cancel()
	client, err := etcd.dial(ctx, quiet)
	if err != nil {
		return nil, nothing
	}
	defer client.Close()
	list, err := of(ctx, client)
	if err != nil {
		return nil, nothing
	}
	return offer(list, to), nothing
}

func contextOf(c *cobra.Command) context.Context {
	if ctx := c.Context(); ctx != nil {
		return ctx
	}
	return context.Background()
}

// word is what is put into a command line. Whoever may write to etcd chooses names, and some shells expand what they
// are offered: a name that is none in Kubernetes is left out.
var word = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._:/=-]*[A-Za-z0-9:=])?$`)

// maxOffered is how many are offered: a shell asks before it prints as many.
const maxOffered = 10000

// offer returns what of a list begins as what is there already, sorted.
func offer(list []string, to string) []string {
	out := slices.DeleteFunc(slices.Clone(list), func(s string) bool { return !word.MatchString(s) || !strings.HasPrefix(s, to) })
	slices.Sort(out)
	out = slices.Compact(out)
	return out[:min(len(out), maxOffered)]
}

// names are those of the records below a prefix.
func names(prefix string) values {
	return func(ctx context.Context, c *store.Client) (out []string, err error) {
		err = c.EachKey(ctx, prefix, maxOffered, func(key string) error {
			out = append(out, strings.TrimPrefix(key, prefix))
			return ctx.Err()
		})
		return out, err
	}
}

var (
	nodes         = names(store.NodePrefix)
	ips           = names(store.AllocationPrefix)
	pinnedIPs     = names(store.PinPrefix)
	cordonedNodes = names(store.CordonPrefix)
)

// pooledIPs are those that move: not the static ones.
func pooledIPs(ctx context.Context, c *store.Client) (out []string, err error) {
	records, err := c.List(ctx, store.AllocationPrefix)
	for _, r := range records {
		if a, err := store.Decode[egress.Allocation](r); err == nil && a.Pool != "" {
			out = append(out, a.IP.String())
		}
	}
	return out, err
}

// pods are all that crdsync knows, those that no egress selects included.
func pods(ctx context.Context, c *store.Client) ([]string, error) {
	records, err := c.List(ctx, store.MembersByNode)
	all := map[string]bool{}
	for _, r := range records {
		m, err := store.Decode[egress.Members](r)
		if err != nil {
			continue // another command says so
		}
		for _, p := range m.Pods {
			all[p.Pod] = true
		}
	}
	return slices.Collect(maps.Keys(all)), err
}
