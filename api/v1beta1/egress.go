package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Egress gives the traffic of selected Pods to the outside of the cluster a source IP of its own.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,path=egresses,shortName=eg
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="EgressIP",type=string,JSONPath=`.status.egressIP`,description="The IP that the Pods' traffic leaves with."
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.status.egressNode`,description="The Node that holds the IP."
// +kubebuilder:printcolumn:name="SecondIP",type=string,priority=1,JSONPath=`.status.addresses[1].ip`,description="The IP of the other IP family."
// +kubebuilder:printcolumn:name="Pool",type=string,priority=1,JSONPath=`.spec['externalIPPool','externalIPPools']`
// +kubebuilder:printcolumn:name="Allocated",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="IPAllocated")].reason`
// +kubebuilder:printcolumn:name="Assigned",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="IPAssigned")].reason`
// +kubebuilder:printcolumn:name="Conflict",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Conflict")].reason`
// +kubebuilder:printcolumn:name="Degraded",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Degraded")].reason`
// +kubebuilder:printcolumn:name="Cause",type=string,priority=1,JSONPath=`.status.conditions[?(@.status=="False")].message`
type Egress struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec EgressSpec `json:"spec"`
	// +optional
	Status EgressStatus `json:"status,omitzero"`
}

// EgressList is a list of Egresses.
//
// +kubebuilder:object:root=true
type EgressList struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Egress `json:"items"`
}

// EgressSpec says which Pods, which IP, and how much of the network.
//
// +kubebuilder:validation:XValidation:rule="has(self.egressIP) || has(self.externalIPPool) && size(self.externalIPPool) > 0 || has(self.egressIPs) && size(self.egressIPs) > 0 || has(self.externalIPPools) && size(self.externalIPPools) > 0",message="neither egressIP nor externalIPPool is set: want one of them, or both"
// +kubebuilder:validation:XValidation:rule="!(has(self.egressIP) || has(self.externalIPPool) && size(self.externalIPPool) > 0) || !(has(self.egressIPs) && size(self.egressIPs) > 0 || has(self.externalIPPools) && size(self.externalIPPools) > 0)",message="want egressIP and externalIPPool, or egressIPs and externalIPPools, not a mixture",messageExpression="(has(self.egressIP) ? 'egressIP ' + self.egressIP : 'externalIPPool ' + self.externalIPPool) + ' beside ' + (has(self.egressIPs) && size(self.egressIPs) > 0 ? 'egressIPs ' + self.egressIPs.join(' and ') : 'externalIPPools ' + self.externalIPPools.join(' and ')) + ': want egressIP and externalIPPool, or egressIPs and externalIPPools, not a mixture'"
type EgressSpec struct {
	// AppliedTo selects the Pods. An empty one selects nothing.
	AppliedTo AppliedTo `json:"appliedTo"`
	// EgressIP is the source IP. With a pool it has to be one of the pool's; without a pool it is static: it is already
	// on an interface of one Node, which is then found. Left out: an IP of the pool is allocated.
	// +optional
	EgressIP IP `json:"egressIP,omitempty"`
	// EgressIPs are the source IPs, at most one of each IP family.
	// +optional
	// +kubebuilder:validation:MaxItems=2
	// +kubebuilder:validation:XValidation:rule="size(self) < 2 || !self.all(i, isIP(i)) || ip(self[0]).family() != ip(self[1]).family()",message="want at most one of each IP family",messageExpression="'egressIPs ' + self[0] + ' and ' + self[1] + ': want at most one of each IP family'"
	// +listType=atomic
	EgressIPs []IP `json:"egressIPs,omitempty"`
	// ExternalIPPool names the pool that the IP comes from, and whose Nodes may hold it.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	ExternalIPPool string `json:"externalIPPool,omitempty"`
	// ExternalIPPools name the pools that the IPs come from, at most one of each IP family.
	// +optional
	// +kubebuilder:validation:MaxItems=2
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="size(self) < 2 || self[0] != self[1]",message="want two different pools, one of each IP family",messageExpression="'externalIPPools ' + self[0] + ' and ' + self[1] + ': want two different pools, one of each IP family'"
	// +listType=atomic
	ExternalIPPools []string `json:"externalIPPools,omitempty"`
	// Bandwidth limits the traffic that leaves with each of the IPs.
	// +optional
	Bandwidth *Bandwidth `json:"bandwidth,omitempty"`
}

// AppliedTo selects Pods. Both selectors together select the Pods that match both; the podSelector alone selects in all
// Namespaces.
type AppliedTo struct {
	// PodSelector selects Pods by their labels. An empty selector, other than none, selects all.
	// +optional
	PodSelector *LabelSelector `json:"podSelector,omitempty"`
	// NamespaceSelector selects the Pods of Namespaces by the Namespaces' labels. An empty selector, other than none,
	// selects all.
	// +optional
	NamespaceSelector *LabelSelector `json:"namespaceSelector,omitempty"`
}

// Bandwidth is a limit that all Pods of an Egress share. The values are quantities, such as 300k, 100M or 2G.
type Bandwidth struct {
	// Rate is the largest rate, in bits per second.
	Rate Quantity `json:"rate"`
	// Burst is how many bits may leave at once, a second of the rate at least.
	Burst Quantity `json:"burst"`
}

// Quantity is a Kubernetes quantity above 0, not in thousandths or less, that fits into 63 bits.
//
// +kubebuilder:validation:MaxLength=64
// +kubebuilder:validation:XValidation:rule="isQuantity(self) && quantity(self).isGreaterThan(quantity('0')) && !quantity(self).isGreaterThan(quantity('9223372036854775807'))",message="want a quantity above 0 and at most 9223372036854775807, like 300k, 100M or 2G"
// +kubebuilder:validation:XValidation:rule="!self.matches('[num]$')",message="want no thousandths: 100m is a tenth, 100M a hundred million"
type Quantity string

// IP is an IPv4 or IPv6 address of one host that routers forward, in any spelling. It is compared as an address, not as
// text.
//
// +kubebuilder:validation:MaxLength=45
// +kubebuilder:validation:XValidation:rule="isIP(self)",message="want an IPv4 or IPv6 address"
// +kubebuilder:validation:XValidation:rule="!isIP(self) || ip(self).isGlobalUnicast()",message="want a unicast address, neither loopback nor link-local"
type IP string

// EgressStatus is what became of an Egress.
type EgressStatus struct {
	// EgressNode is the Node that holds the IP; empty while none does.
	// +optional
	EgressNode string `json:"egressNode,omitempty"`
	// EgressIP is the source IP; empty while none is allocated.
	// +optional
	EgressIP string `json:"egressIP,omitempty"`
	// Addresses are the source IPs, at most one of each IP family, and their Nodes. The first is EgressIP.
	// +optional
	// +listType=map
	// +listMapKey=ip
	Addresses []EgressAddress `json:"addresses,omitempty"`
	// Conditions are IPAllocated and IPAssigned, and Conflict and Degraded where they are True, in this order.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []EgressCondition `json:"conditions,omitempty"`
}

// EgressAddress is one source IP of an Egress.
type EgressAddress struct {
	IP string `json:"ip"`
	// Node is the Node that holds the IP; empty while none does.
	// +optional
	Node string `json:"node,omitempty"`
}

// EgressConditionType names a condition of an Egress.
type EgressConditionType string

// The conditions.
const (
	// IPAllocated: an IP is set apart for the Egress.
	IPAllocated EgressConditionType = "IPAllocated"
	// IPAssigned: a Node holds the IP.
	IPAssigned EgressConditionType = "IPAssigned"
	// Conflict: an Egress that comes first has some of what this one asks for. Of two Egresses the older one comes
	// first, by name at equal age. The condition is there while it is True only.
	Conflict EgressConditionType = "Conflict"
	// Degraded: a Node that holds the IP, or runs selected Pods, could not program all that this takes, or a host
	// outside the cluster uses the IP as well. The condition is there while it is True only.
	Degraded EgressConditionType = "Degraded"
)

// The reasons of the conditions.
const (
	ReasonAllocated       = "Allocated"
	ReasonAllocationError = "AllocationError"
	ReasonAssigned        = "Assigned"
	ReasonAssignmentError = "AssignmentError"

	ReasonOverlappingSelection = "OverlappingSelection" // some Pods are another Egress's
	ReasonDuplicateIP          = "DuplicateIP"          // an IP is another Egress's

	ReasonProgrammingError = "ProgrammingError"
	ReasonAddressInUse     = "AddressInUse"   // a host outside the cluster uses the IP, too
	ReasonTrafficDropped   = "TrafficDropped" // a node's guard drops packets of the Egress
	ReasonPortsExhausted   = "PortsExhausted" // a node has fewer ports of the IP than it should, or none of its own
)

// EgressCondition is one aspect of an Egress's state.
type EgressCondition struct {
	Type EgressConditionType `json:"type"`
	// +kubebuilder:validation:Enum=True;False;Unknown
	Status metav1.ConditionStatus `json:"status"`
	// LastTransitionTime is when Status last changed.
	// +optional
	LastTransitionTime metav1.Time `json:"lastTransitionTime,omitzero"`
	// Reason is a word for programs.
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message is a sentence for people. It names the cause.
	// +optional
	Message string `json:"message,omitempty"`
	// ObservedGeneration is the metadata.generation that the condition is about.
	// +optional
	// +kubebuilder:validation:Minimum=0
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
}
