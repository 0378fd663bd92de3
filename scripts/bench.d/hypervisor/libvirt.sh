# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# libvirtd and virtlogd with directories of their own, in the mount namespace that the caller made. $1: where those are.
set -euo pipefail
dir=$1
mount --make-rprivate /
for path in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt; do
	mkdir -p "$path" "$dir/fs$path"
	mount --bind "$dir/fs$path" "$path"
done
mkdir -p /etc/libvirt/qemu /var/lib/libvirt/qemu
printf 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\n' >/etc/libvirt/qemu.conf
printf 'unix_sock_group = "root"\nauth_unix_ro = "none"\nauth_unix_rw = "none"\n' >/etc/libvirt/libvirtd.conf
: >/etc/libvirt/virtlogd.conf
# It insists on the names of users that only another package makes, also where it uses none of them.
for file in passwd group; do cp "/etc/$file" "$dir/$file"; done
grep -q '^libvirt-qemu:' "$dir/passwd" || echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin' >>"$dir/passwd"
for group in libvirt-qemu:64055 kvm:106 libvirt:107; do
	grep -q "^${group%%:*}:" "$dir/group" || echo "${group%%:*}:x:${group#*:}:" >>"$dir/group"
done
for file in passwd group; do mount --bind "$dir/$file" "/etc/$file"; done
virtlogd &
echo $! >"$dir/virtlogd.pid"
libvirtd &
echo $! >"$dir/libvirtd.pid"
wait
