// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package snmp

import (
	"context"
	"time"

	"github.com/gosnmp/gosnmp"
)

// handleV3 goes through the checks of RFC 3414 section 3.2 in their order.
// header is what can be read without a key.
func (a *Agent) handleV3(ctx context.Context, request []byte, header *gosnmp.SnmpPacket) []byte {
	sp, ok := header.SecurityParameters.(*gosnmp.UsmSecurityParameters)
	if !ok || a.user == nil || header.SecurityModel != gosnmp.UserSecurityModel {
		a.count(unsupported)
		return nil
	}
	engineTime := uint32(max(0, a.cfg.Now().Sub(a.began)/time.Second)) //nolint:gosec // 68 years
	switch {
	case sp.AuthoritativeEngineID != a.engine:
		return a.report(header, usmUnknownEngine, engineTime)
	case sp.UserName != a.cfg.User:
		a.count(unknownUser)
		return a.report(header, usmUnknownUser, engineTime)
	case header.MsgFlags&gosnmp.AuthPriv != gosnmp.AuthPriv:
		a.count(notAuthentic)
		return a.report(header, usmUnsupportedLevel, engineTime)
	}
	dec := &gosnmp.GoSNMP{
		Version: gosnmp.Version3, SecurityModel: gosnmp.UserSecurityModel,
		MsgFlags: gosnmp.AuthPriv, SecurityParameters: a.user.Copy(),
	}
	// UnmarshalTrap is gosnmp's way to read a message that it did not ask for:
	// it checks the digest before it decrypts.
	p, err := dec.UnmarshalTrap(append([]byte(nil), request...), true)
	if err != nil {
		a.count(notAuthentic)
		return a.report(header, usmWrongDigest, engineTime)
	}
	if off := int64(engineTime) - int64(sp.AuthoritativeEngineTime); sp.AuthoritativeEngineBoots != a.boots || off > int64(timeWindow/time.Second) || off < -int64(timeWindow/time.Second) {
		a.count(stale)
		return a.notInWindow(p, engineTime)
	}
	return a.finish(ctx, p, a.frame(p, gosnmp.AuthPriv, engineTime))
}

// frame is the message around an answer under a security level.
func (a *Agent) frame(p *gosnmp.SnmpPacket, flags gosnmp.SnmpV3MsgFlags, engineTime uint32) *gosnmp.SnmpPacket {
	sp := &gosnmp.UsmSecurityParameters{}
	if flags != gosnmp.NoAuthNoPriv {
		sp = a.user.Copy().(*gosnmp.UsmSecurityParameters) //nolint:forcetypeassert // it is a copy of one
	}
	sp.AuthoritativeEngineID, sp.AuthoritativeEngineBoots, sp.AuthoritativeEngineTime = a.engine, a.boots, engineTime
	return &gosnmp.SnmpPacket{
		Version: gosnmp.Version3, MsgID: p.MsgID, MsgMaxSize: maxRequest, MsgFlags: flags,
		SecurityModel: gosnmp.UserSecurityModel, SecurityParameters: sp,
		ContextEngineID: a.engine, ContextName: p.ContextName,
	}
}

// report tells why a message was not taken, without data (RFC 3412 section
// 7.1.2): an asker needs it to learn the engine's ID and time.
func (a *Agent) report(header *gosnmp.SnmpPacket, counter string, engineTime uint32) []byte {
	if header.MsgFlags&gosnmp.Reportable == 0 {
		return nil
	}
	frame := a.frame(header, gosnmp.NoAuthNoPriv, engineTime)
	return a.sendReport(frame, header.RequestID, counter)
}

// notInWindow is authentic, so that the asker may believe the time in it.
func (a *Agent) notInWindow(p *gosnmp.SnmpPacket, engineTime uint32) []byte {
	if p.MsgFlags&gosnmp.Reportable == 0 {
		return nil
	}
	return a.sendReport(a.frame(p, gosnmp.AuthNoPriv, engineTime), p.RequestID, usmNotInWindow)
}

func (a *Agent) sendReport(frame *gosnmp.SnmpPacket, requestID uint32, counter string) []byte {
	frame.PDUType, frame.RequestID = gosnmp.Report, requestID
	frame.Variables = []gosnmp.SnmpPDU{{Name: "." + counter, Type: gosnmp.Counter32, Value: a.reports(counter)}}
	out, err := frame.MarshalMsg()
	if err != nil {
		a.cfg.Log.Debug("snmp report not encoded", "err", err)
		return nil
	}
	return out
}

func (a *Agent) reports(counter string) uint32 {
	s := a.Stats()
	n := uint64(1) // discoveries are not counted
	switch counter {
	case usmUnknownUser:
		n = s.UnknownUser
	case usmWrongDigest, usmUnsupportedLevel:
		n = s.NotAuthentic
	case usmNotInWindow:
		n = s.Stale
	}
	return uint32(n) //nolint:gosec // counters wrap
}
