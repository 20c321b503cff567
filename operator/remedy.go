package operator

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// inAgent returns the line for a shell that runs an egret command in the agent's pod of a node, where the agent answers
// it; "": the namespace is not known, or the node has no name that Kubernetes takes. Others write records, and so names.
func inAgent(namespace, node, command string) string {
	if namespace == "" || len(validation.IsDNS1123Subdomain(node)) > 0 {
		return ""
	}
	return fmt.Sprintf("kubectl exec -n %s $(kubectl get pods -n %[1]s -o name -l app.kubernetes.io/name=egret-agent --field-selector spec.nodeName=%s) -- %s",
		namespace, node, command)
}

// command returns the question as a line for a shell, but for Live: it takes both nodes; "": the pod has no name that
// Kubernetes takes.
func (q Question) command() string {
	namespace, name, _ := strings.Cut(q.Pod, "/")
	if len(validation.IsDNS1123Label(namespace))+len(validation.IsDNS1123Subdomain(name)) > 0 {
		return ""
	}
	out := "egret trace " + q.Pod
	if q.To.IsValid() {
		out += " --to " + q.To.String()
	}
	if q.Protocol != "" {
		out += " --protocol " + q.Protocol // was checked by trace
	}
	if q.Port != 0 {
		out += fmt.Sprintf(" --port %d", q.Port)
	}
	return out
}

// unasked says how to ask the agents of nodes that are not reached from here: by a command the first.
func (q Question) unasked(nodes []string) string {
	text := fmt.Sprintf("the agent of %s is not reached from here: --agents-port asks it", nodes[0])
	which := ""
	if len(nodes) > 1 {
		text = fmt.Sprintf("the agents of %s are not reached from here: --agents-port asks them", strings.Join(nodes, " and "))
		which = ", that of " + nodes[0] + ","
	}
	if command := q.command(); command != "" {
		if line := inAgent(q.Namespace, nodes[0], command); line != "" {
			text += ", or" + which + " `" + line + "`"
		}
	}
	return text
}
