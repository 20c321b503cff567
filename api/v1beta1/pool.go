package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ExternalIPPool is one or several ranges of IPs that can be given to Egresses, and the Nodes that may hold them.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,path=externalippools,shortName=eip
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Total",type=integer,JSONPath=`.status.usage.total`,description="The number of IPs in the pool."
// +kubebuilder:printcolumn:name="Used",type=integer,JSONPath=`.status.usage.used`,description="The number of IPs that are allocated."
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Nodes",type=string,priority=1,JSONPath=`.spec.nodeSelector`,description="The selector of the Nodes that may hold the IPs."
type ExternalIPPool struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec ExternalIPPoolSpec `json:"spec"`
	// +optional
	Status ExternalIPPoolStatus `json:"status,omitzero"`
}

// ExternalIPPoolList is a list of ExternalIPPools.
//
// +kubebuilder:object:root=true
type ExternalIPPoolList struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ExternalIPPool `json:"items"`
}

// ExternalIPPoolSpec says which IPs, of which subnet, on which Nodes.
type ExternalIPPoolSpec struct {
	// IPRanges are the IPs of the pool. They are given out in this order.
	// +kubebuilder:validation:MaxItems=1000
	// +listType=atomic
	IPRanges []IPRange `json:"ipRanges"`
	// SubnetInfo describes the subnet of the IPs, when it is not that of the Nodes.
	// +optional
	SubnetInfo *SubnetInfo `json:"subnetInfo,omitempty"`
	// NodeSelector selects the Nodes that may hold the IPs. An empty one selects all.
	NodeSelector LabelSelector `json:"nodeSelector"`
}

// IPRange is either a cidr, or a start and an end.
//
// +kubebuilder:validation:XValidation:rule="has(self.cidr) ? !has(self.start) && !has(self.end) : has(self.start) && has(self.end)",message="want a cidr, or a start and an end, not both",messageExpression="has(self.cidr) ? 'cidr ' + self.cidr + (has(self.start) ? ', start ' + self.start : \"\") + (has(self.end) ? ', end ' + self.end : \"\") + ': want a cidr, or a start and an end, not both' : (has(self.start) ? 'start ' + self.start + ' without an end' : has(self.end) ? 'end ' + self.end + ' without a start' : 'neither cidr nor start and end') + ': want a cidr, or a start and an end'"
type IPRange struct {
	// CIDR is the range without its first IP, and for IPv4 without its last one: 10.10.1.0/28 has 14 IPs, a /31 none.
	// +optional
	// +kubebuilder:validation:MaxLength=49
	// +kubebuilder:validation:XValidation:rule="isCIDR(self)",message="want an address and a prefix length, like 10.10.1.0/28"
	// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self).ip().isGlobalUnicast()",message="want unicast addresses, neither loopback nor link-local"
	CIDR string `json:"cidr,omitempty"`
	// Start is the first IP of the range.
	// +optional
	Start IP `json:"start,omitempty"`
	// End is the last IP of the range.
	// +optional
	End IP `json:"end,omitempty"`
}

// SubnetInfo describes a subnet.
//
// +kubebuilder:validation:XValidation:rule="!isIP(self.gateway) || ip(self.gateway).family() == 6 || self.prefixLength <= 31",message="want a prefixLength of 1 to 31 with an IPv4 gateway",messageExpression="'prefixLength %d: want 1 to 31, as the gateway is %s'.format([dyn(self.prefixLength), dyn(self.gateway)])"
type SubnetInfo struct {
	// Gateway is the subnet's router. It is never given out.
	Gateway IP `json:"gateway"`
	// PrefixLength is the length of the subnet's prefix, in bits.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=127
	PrefixLength int32 `json:"prefixLength"`
	// VLAN is the id that the traffic of the IPs is tagged with. 0: untagged.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4094
	VLAN int32 `json:"vlan,omitempty"`
}

// ExternalIPPoolStatus is the state of a pool.
type ExternalIPPoolStatus struct {
	// +optional
	Usage IPPoolUsage `json:"usage"`
}

// IPPoolUsage counts IPs.
type IPPoolUsage struct {
	// Total is the number of IPs in the pool.
	Total int64 `json:"total"`
	// Used is the number of IPs that are allocated.
	Used int64 `json:"used"`
}
