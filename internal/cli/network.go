// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) networkCmd() *cobra.Command {
	var typ string
	var vlan, vni int
	var labels []string
	create := &cobra.Command{
		Use: "create NAME", Short: "Create a network that is the same on every node", Args: args("NAME"),
		Long: `Creates a network. A vlan network leaves each node through its uplink with a tag,
a vxlan network joins the nodes by tunnels between their addresses, an isolated
one joins the VMs of each node alone. Type, tag and VNI cannot be changed later.`,
		Example: `  muster network create lab --type vxlan --vni 100
  muster network create office --type vlan --vlan 20
  muster network create scratch --type isolated`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			l, err := parseLabels(labels, false)
			if err != nil {
				return err
			}
			if typ == "" {
				return usagef("network create: --type is missing; give vlan, vxlan or isolated")
			}
			spec := map[string]any{"type": typ}
			set(spec, "vlan", vlan)
			set(spec, "vni", vni)
			return a.create(cmd.Context(), api.KindNetwork, names[0], l, spec)
		},
	}
	create.Flags().StringVar(&typ, "type", "", "vlan, vxlan or isolated")
	create.Flags().IntVar(&vlan, "vlan", 0, "tag of a vlan network, 1 to 4094")
	create.Flags().IntVar(&vni, "vni", 0, "identifier of a vxlan network, 1 to 16777215")
	create.Flags().StringArrayVar(&labels, "label", nil, "label KEY=VALUE (repeatable)")
	return group("network", "Networks of VMs", create, a.lsCmd(api.KindNetwork), a.showCmd(api.KindNetwork),
		a.rmCmd(api.KindNetwork, "Removes networks that no VM and no IP pool uses."))
}

func (a *app) ippoolCmd() *cobra.Command {
	var network, cidr, gateway, start, end, domain string
	var dns []string
	create := &cobra.Command{
		Use: "create NAME", Short: "Give a network addresses for its VMs", Args: args("NAME"),
		Long: `Creates the IP pool of a network: each network card gets an address of it when it
is created, and is told it by DHCP on whatever node its VM runs.`,
		Example: `  muster ippool create lab --network lab --cidr 10.20.0.0/24
  muster ippool create office --network office --cidr 192.168.7.0/24 --gateway 192.168.7.1 --start 192.168.7.100 --end 192.168.7.199 --dns 192.168.7.1`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			if network == "" || cidr == "" {
				return usagef("ippool create: --network or --cidr is missing")
			}
			spec := map[string]any{"network": network, "cidr": cidr}
			set(spec, "gateway", gateway)
			set(spec, "start", start)
			set(spec, "end", end)
			set(spec, "domain", domain)
			if len(dns) > 0 {
				spec["dns"] = dns
			}
			return a.create(cmd.Context(), api.KindIPPool, names[0], nil, spec)
		},
	}
	fs := create.Flags()
	fs.StringVar(&network, "network", "", "the network; it has one pool")
	fs.StringVar(&cidr, "cidr", "", "subnet, such as 10.20.0.0/24")
	fs.StringVar(&gateway, "gateway", "", "the router's address, which is not handed out")
	fs.StringVar(&start, "start", "", "first address to hand out (default: the subnet's first)")
	fs.StringVar(&end, "end", "", "last address to hand out (default: the subnet's last)")
	fs.StringSliceVar(&dns, "dns", nil, "DNS server (repeatable, at most 4)")
	fs.StringVar(&domain, "domain", "", "domain that guests are told")
	return group("ippool", "Addresses for VMs", create, a.lsCmd(api.KindIPPool), a.showCmd(api.KindIPPool),
		a.rmCmd(api.KindIPPool, "Removes IP pools of which no address is reserved."))
}

func (a *app) uplinkCmd() *cobra.Command {
	var node, nic string
	create := &cobra.Command{
		Use: "create NAME", Short: "Let the vlan networks of a node out through one of its NICs", Args: args("NAME"),
		Long: `Bridges a NIC of a node into its virtual switch, as a trunk of all vlan networks.
A NIC that carries an address of the host is refused: it would cut the host off.`,
		Example:           "  muster uplink create up1 --node m1 --nic eth1",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			if node == "" || nic == "" {
				return usagef("uplink create: --node or --nic is missing")
			}
			return a.create(cmd.Context(), api.KindUplink, names[0], nil, map[string]any{"node": node, "nic": nic})
		},
	}
	create.Flags().StringVar(&node, "node", "", "the node")
	create.Flags().StringVar(&nic, "nic", "", "name of the NIC on the node")
	return group("uplink", "NICs that vlan networks leave nodes through", create, a.lsCmd(api.KindUplink), a.showCmd(api.KindUplink),
		a.rmCmd(api.KindUplink, "Takes NICs out of the virtual switch. VLAN networks of the node end there."))
}

// noNetwork is what --network takes for no network card at all.
const noNetwork = "none"

const networkHelp = "network card on this network: NETWORK[,mac=ADDRESS][,ip=ADDRESS][,in=BYTES][,out=BYTES], the last two being what the guest may receive and send in a second (repeatable)"

// parseNICs reads the values of --network.
func parseNICs(flags []string) ([]map[string]any, error) {
	out := []map[string]any{}
	if len(flags) == 1 && flags[0] == noNetwork {
		return out, nil
	}
	for _, f := range flags {
		parts := strings.Split(f, ",")
		nic := map[string]any{"network": parts[0]}
		if parts[0] == "" || strings.Contains(parts[0], "=") {
			return nil, usagef("--network: %q does not begin with the name of a network", f)
		}
		for _, p := range parts[1:] {
			key, value, _ := strings.Cut(p, "=")
			if limit := map[string]string{"in": "bpsIn", "out": "bpsOut"}[key]; limit != "" {
				size, err := api.ParseSize(value)
				if err != nil {
					return nil, usagef("--network: %s: %v", p, err)
				}
				limits, _ := nic["limit"].(map[string]any)
				if limits == nil {
					limits = map[string]any{}
				}
				limits[limit] = size
				nic["limit"] = limits
				continue
			}
			field := map[string]string{"mac": "mac", "ip": "address"}[key]
			if field == "" || value == "" {
				return nil, usagef("--network: %q is none of mac=ADDRESS, ip=ADDRESS, in=BYTES and out=BYTES", p)
			}
			nic[field] = strings.ToLower(value)
		}
		out = append(out, nic)
	}
	return out, nil
}

func networkRow(o *api.Network, now time.Time) []string {
	ready := 0
	for _, n := range o.Status.Nodes {
		if n.Ready {
			ready++
		}
	}
	return []string{o.Meta.Name, string(o.Spec.Type), dash(number(uint64(o.Spec.VLAN + o.Spec.VNI))),
		strconv.Itoa(ready) + "/" + strconv.Itoa(len(o.Status.Nodes)), age(o.Meta.CreatedAt, now)}
}

func networkShow(s *sections, o *api.Network, _ time.Time) {
	s.field("Type", string(o.Spec.Type))
	s.field("VLAN", number(uint64(o.Spec.VLAN)))
	s.field("VNI", number(uint64(o.Spec.VNI)))
	s.title("Nodes")
	t := &table{head: []string{"NODE", "READY", "REASON"}}
	for _, n := range o.Status.Nodes {
		t.add(n.Node, yesNo(n.Ready), n.Reason)
	}
	s.table(t)
}

func ippoolRow(o *api.IPPool, now time.Time) []string {
	return []string{o.Meta.Name, o.Spec.Network, o.Spec.CIDR, dash(o.Spec.Gateway), strconv.Itoa(o.Status.Used),
		strconv.Itoa(o.Status.Total), age(o.Meta.CreatedAt, now)}
}

func ippoolShow(s *sections, o *api.IPPool, _ time.Time) {
	s.field("Network", o.Spec.Network)
	s.field("Subnet", o.Spec.CIDR)
	s.field("Gateway", o.Spec.Gateway)
	s.field("First", o.Spec.Start)
	s.field("Last", o.Spec.End)
	s.field("DNS", strings.Join(o.Spec.DNS, ", "))
	s.field("Domain", o.Spec.Domain)
	s.field("Reserved", strconv.Itoa(o.Status.Used)+" of "+strconv.Itoa(o.Status.Total))
}

func uplinkRow(o *api.Uplink, now time.Time) []string {
	return []string{o.Meta.Name, o.Spec.Node, o.Spec.NIC, yesNo(o.Status.Ready), age(o.Meta.CreatedAt, now), o.Status.Message}
}

func uplinkShow(s *sections, o *api.Uplink, _ time.Time) {
	s.field("Node", o.Spec.Node)
	s.field("NIC", o.Spec.NIC)
	s.field("Ready", yesNo(o.Status.Ready))
	s.field("Message", o.Status.Message)
}
